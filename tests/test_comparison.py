"""benchmarks/comparison: what has a result is not run again, a stopped run goes on, and the page shows the results."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from pyramiddrop.evaluation.answering import Answerer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import comparison_document as document  # noqa: E402
from comparison import run_experiments as runner  # noqa: E402
from comparison_document import Panel, Point, front  # noqa: E402

FAST = {"task": "digits", "method": "fastv:layer=1,keep=0.1", "limit": 4, "batch": 2}
VANILLA = FAST | {"method": "vanilla"}


def write(root: Path, name: str, experiment: Any) -> None:
    path = root / "experiments" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(experiment if isinstance(experiment, str) else json.dumps(experiment))


def run(root: Path, *words: str) -> int:
    return runner.main([*words, "--device", "cpu"], root, root / "kept")


# --- What runs ------------------------------------------------------------------------------------------------------


def test_what_has_a_result_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(experiment: runner.Experiment, *given: Any) -> dict[str, Any]:
        measured.append(experiment.method)
        return {"of": experiment.method}

    monkeypatch.setattr(runner, "measure_bundled", measure)
    write(tmp_path, "digits/fast", FAST)
    assert run(tmp_path) == run(tmp_path) == 0
    write(tmp_path, "digits/vanilla", VANILLA)
    write(tmp_path, "reader/vanilla", VANILLA | {"task": "reader"})
    assert run(tmp_path, "--only", "digits") == 0
    assert measured == [FAST["method"], "vanilla"]
    write(tmp_path, "digits/fast", FAST | {"method": "fastv"})  # what the result is of is no longer what is asked
    assert run(tmp_path) == 0
    assert measured[2:] == ["fastv", "vanilla"]
    [fast, *_] = runner.read_experiments(tmp_path)
    assert runner.read_result(tmp_path, fast) == {"of": "fastv"}


def test_an_experiment_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(experiment: runner.Experiment, *given: Any) -> dict[str, Any]:
        if experiment.name == "fast":
            raise runner.InputError("no such layer")
        return {}

    monkeypatch.setattr(runner, "measure_bundled", measure)
    write(tmp_path, "digits/fast", FAST)
    write(tmp_path, "digits/vanilla", VANILLA)
    assert run(tmp_path) == 1
    assert "digits/fast: error: no such layer" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("results/*/*")] == ["vanilla.json"]


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ROUNDS", 0)
    for root in (tmp_path / "whole", tmp_path / "stopped"):
        write(root, "digits/fast", FAST)
        write(root, "digits/vanilla", VANILLA)
    assert run(tmp_path / "whole") == 0
    answered: list[int] = []
    answer: Callable[..., Any] = Answerer._answer

    def stops(self: Answerer, samples: Any, *given: Any) -> Any:
        answered.append(len(samples))
        if len(answered) == 4:  # the second batch under the method: vanilla has answered both
            raise KeyboardInterrupt
        return answer(self, samples, *given)

    monkeypatch.setattr(Answerer, "_answer", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert not list(tmp_path.glob("stopped/results/*/*"))
    answered[:] = [0] * 10
    assert run(tmp_path / "stopped") == 0
    assert answered[10:] == [2]  # that batch alone; vanilla's replies served both experiments
    for name in ("fast", "vanilla"):
        [one, other] = [tmp_path / root / f"results/digits/{name}.json" for root in ("whole", "stopped")]
        assert json.loads(one.read_text()) == json.loads(other.read_text())
    record = json.loads(one.read_text())["record"]
    assert [variant["name"] for variant in record["methods"]] == ["vanilla"]


@pytest.mark.parametrize("code", [0, 1])
def test_lmms_eval_without_results_is_an_error_whatever_its_exit_code(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "m/vanilla", {"task": "mme", "model": "m", "method": "vanilla"})
    stale = tmp_path / "kept" / "m" / "vanilla" / "m" / "1_results.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    monkeypatch.setattr(runner, "check_installed", lambda: None)
    monkeypatch.setattr(runner.subprocess, "run", lambda command, check: CompletedProcess(command, code))
    assert run(tmp_path) == 1
    assert f"m/vanilla: error: lmms-eval wrote no results and ended with exit code {code}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "reason"),
    [
        ("{", "Expecting property name"),
        ([], "must be a JSON object"),
        ({"task": "digits"}, "'method' is missing"),
        (FAST | {"metod": "fastv"}, "unknown field 'metod'; the fields are task, method, model, limit, batch"),
        (FAST | {"limit": 0}, "limit must be a whole number from 1; got 0"),
        (FAST | {"batch": True}, "batch must be a whole number from 1; got True"),
        (FAST | {"model": ""}, "model must be a text; got ''"),
        (FAST | {"method": "fastv:kep=1"}, "kep"),
        (FAST | {"task": "mme"}, "task 'mme' needs a model: only digits and reader have a bundled one"),
        (FAST | {"method": "fastv", "limit": 5}, "limit is 5, and 4 in a.json: experiments of a folder differ"),
        (FAST, "a.json has the same method 'fastv:layer=1,keep=0.1'"),
    ],
)
def test_a_bad_experiment_is_refused_by_its_name(
    experiment: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "digits/a", FAST)
    write(tmp_path, "digits/bad", experiment)
    assert run(tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: digits/bad.json: ")
    assert reason in line


def test_words_that_name_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--only", "digit") == run(tmp_path, "--model", "m") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("experiments/digit")
    assert second == "error: --model and --tasks belong together: they name experiments to add"


def test_a_model_and_tasks_of_lmms_eval_become_experiments(tmp_path: Path) -> None:
    write(tmp_path, "reader/early", FAST | {"task": "reader", "method": "pyramiddrop:keep=0.5/0.25/0"})
    write(tmp_path, "reader/both", FAST | {"task": "reader", "method": "vision:keep=0.3 | pyramiddrop:lam=0.4"})
    runner.add_experiments(tmp_path, "llava-hf/llava-1.5-7b-hf", "mme,pope", limit=100)
    added = [found for found in runner.read_experiments(tmp_path) if found.board == "llava-1.5-7b-hf-mme-pope"]
    both, one = added
    told = "pretrained=llava-hf/llava-1.5-7b-hf,method=vision:keep=0.3|pyramiddrop:lam=0.4"
    assert both.name == "both"
    assert told in runner.lmms_command(both, Path("there"))
    assert (one.name, one.limit, one.bundled) == ("early", 100, False)
    assert runner.lmms_command(one, Path("there"), "cuda") == [
        *(sys.executable, "-m", "lmms_eval", "--model", "pyramiddrop", "--model_args"),
        "pretrained=llava-hf/llava-1.5-7b-hf,method=pyramiddrop,keep=0.5/0.25/0.0",
        *("--tasks", "mme,pope", "--batch_size", "1", "--output_path", "there", "--limit", "100", "--device", "cuda"),
    ]


# --- What is shown --------------------------------------------------------------------------------------------------


def test_the_front_has_what_no_other_beats() -> None:
    whole, half, dear, tie, unknown = (
        Point("whole", 98.0, 1.0, 1.0),
        Point("half", 98.0, 0.5, 0.9),
        Point("dear", 70.0, 0.6, 0.4),
        Point("tie", 98.0, 0.5, 0.95),
        Point("unknown", 99.0, None, None),
    )
    points = [whole, half, dear, tie, unknown]
    assert front(points, "flops") == [half, tie]
    assert front(points, "time") == [dear, half]


def test_a_table_says_what_is_on_the_front() -> None:
    panel = Panel(
        "mme, score", "m", ("score",), [Point("a|b", 1.0, 0.2, None, ("1",)), Point("c", 1.0, 1.0, 1.0, ("1",))]
    )
    assert document.written(panel).splitlines()[4:] == [
        "| method | score | on the front over |",
        "| --- | --- | --- |",
        "| `c` | 1 | time |",
        r"| `a\|b` | 1 | FLOPs |",
    ]


def test_results_of_lmms_eval_have_a_panel_for_each_score(tmp_path: Path) -> None:
    write(tmp_path, "m-mme-pope/fastv", {"task": "mme,pope", "model": "m", "method": "fastv"})
    [one] = runner.read_experiments(tmp_path)
    score = {"value": 1312.25, "error": 0.5}
    own = {"scores": {"mme": {"cognition": score, "perception": score}, "pope": {"f1": score | {"error": None}}}}
    own["costs"] = {"flops_ratio": 0.25, "kv_ratio": 0.3, "retained_visual_tokens": 144.0}
    record = {"methods": [own]}
    runner.write_json(runner.result_path(tmp_path, one), {"experiment": one.asked, "record": record})
    text = document.filled("<!-- begin others -->\n\n<!-- end -->", tmp_path)
    assert re.findall(r"^\*(.*)\*$", text, re.M) == ["mme, cognition", "mme, perception", "pope, f1"]
    assert "| `fastv` | 1312 ± 0.5 | 25.0 % | not known | 30.0 % | 144.0 | FLOPs |" in text
    assert "m, lmms-eval: all questions, batches of 1" in text


def test_the_page_shows_what_the_result_files_hold() -> None:
    text = document.DOCUMENT.read_text("utf-8")
    assert document.filled(text) == text, "run python benchmarks/comparison_document.py"
    assert (document.DOCUMENT.parent / "images" / "study-comparison.png").is_file()
    experiments = runner.read_experiments()
    assert {one.board for one in experiments} >= {"digits", "reader"}
    assert [one for one in experiments if runner.read_result(runner.HERE, one) is None] == []


def test_the_picture_has_a_row_for_each_panel_and_its_front() -> None:
    panel = Panel("digits", "", ("right answers (%)",), [Point("vanilla", 98.0, 1.0, 1.0), Point("a", 90.0, 0.5, None)])
    flops, time = document.draw([panel]).axes
    assert flops.lines[0].get_xydata().tolist() == [[50.0, 90.0], [100.0, 98.0]]
    assert time.lines[0].get_xydata().tolist() == [[100.0, 98.0]]
    assert [len(axis.collections) for axis in (flops, time)] == [2, 1]
