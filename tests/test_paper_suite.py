"""The paper's tables as data, and what lmms-eval measured beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyramiddrop import PyramidDrop
from pyramiddrop.cli.main import app
from pyramiddrop.evaluation.lmms import run as benchmarks
from pyramiddrop.evaluation.lmms.run import Measured, TaskScore, read_measured, run_benchmarks
from pyramiddrop.evaluation.paper import paper_figures
from pyramiddrop.evaluation.paper.tables import average, paper_benchmarks, paper_tables, published_rows, suite_record
from pyramiddrop.inference import InputError
from test_cli_eval import run, run_json
from test_cli_generate import assert_one_line

#: As lmms-eval 0.7.3 writes them.
RAW = {
    "results": {
        "mme": {"alias": "mme", "mme_perception_score,none": 1500.0, "mme_perception_score_stderr,none": "N/A"},
        "docvqa_val": {"anls,none": 0.7, "anls_stderr,none": 0.01, "submission,none": None},
    },
    "throughput": {"avg_speed": 3.0, "avg_flops_ratio": 0.45, "avg_flops_ratio/mme": 0.4},
    "config": {
        "model": "pyramiddrop",
        "model_args": "pretrained=some/model,method=pyramiddrop,lam=0.5,backend=generic",
    },
}
MEASURED = Measured(
    "method=pyramiddrop,lam=0.5",
    {"mme": {"mme_perception_score": TaskScore(1500.0)}, "docvqa_val": {"anls": TaskScore(0.7, 0.01)}},
    {"flops_ratio": 0.45},
)


def test_the_averages_of_the_paper_are_those_of_its_figures() -> None:
    """Each printed average but for the last digit, which the paper took of unrounded figures."""
    rows = [row for table in paper_tables() for row in table.rows]
    assert len(rows) == 28
    for row in rows:
        own = average({column: float(score) for column, score in row.scores.items()})
        assert own == pytest.approx(float(row.average), abs=0.11), row


def test_a_row_that_two_tables_print_is_the_same_in_both() -> None:
    printed: dict[tuple[str, ...], dict[str, str]] = {}
    for table in paper_tables():
        for row in table.rows:
            told = row.settings
            ways = {told.get(name) for name in ("train_and_infer", "train", "infer", "lambda")} - {None}
            if ways != {"vanilla"} or told.get("patches") == "9":
                continue
            known = printed.setdefault((told["model"],), {})
            for column, score in row.scores.items():
                assert float(known.setdefault(column, score)) == float(score), (table.number, row)


def test_the_flops_of_the_tables_are_those_of_the_cost_models_list() -> None:
    listed = [(figure.table, figure.printed) for figure in paper_figures() if figure.table != "Video"]
    told = [(f"Table {table.number}", row.tflops) for table in paper_tables() for row in table.rows if row.tflops]
    assert [(table, float(value)) for table, value in told] == [(table, float(value)) for table, value in listed]


def test_the_benchmarks_are_the_papers_fourteen_and_scienceqa() -> None:
    found = paper_benchmarks()
    assert len(found) == 15
    assert [benchmark.name for benchmark in found.values() if not benchmark.task] == ["OCRVQA"]
    assert {benchmark.column for table in paper_tables() for benchmark in table.benchmarks} == set(found)


@pytest.mark.parametrize("own", [True, False])
def test_results_are_read_back(tmp_path: Path, own: bool) -> None:
    if own:
        (tmp_path / "results.json").write_text(json.dumps(benchmarks.benchmarks_record([MEASURED], None)))
    else:
        (tmp_path / "a__b").mkdir()
        (tmp_path / "a__b" / "20261125_results.json").write_text(json.dumps(RAW))
    (file,) = tmp_path.rglob("*results.json")
    assert read_measured(tmp_path) == read_measured(file) == [MEASURED]


def test_what_is_measured_is_told_in_the_papers_units() -> None:
    whole = Measured(
        "all",
        {b.task: {b.metric: TaskScore(0.5 if b.scale == 100 else 50)} for b in paper_benchmarks().values() if b.task},
    )
    part, full = suite_record([MEASURED, whole])["measured"]
    assert part["scores"] == {"mme": {"value": 1500, "error": None}, "docvqa": {"value": 70, "error": 1}}
    assert part["averages"] == {}
    assert list(full["averages"]) == ["1", "3", "4", "5"]  # Table 2 has OCRVQA
    assert full["averages"]["1"] == pytest.approx((50 / 20 + 5 * 50) / 6)  # MME: 50 of 2000


def test_the_suite_without_a_run() -> None:
    record = run_json_suite()
    assert record["measured"] == []
    first = record["tables"][0]["rows"][0]
    assert (first["model"], first["scores"]["mme"], first["average"]) == ("LLaVA-NeXT-7B", 1534.1, 67.4)
    result = suite()
    assert result.exit_code == 0
    for words in ("mmbench_en_dev", "lmms-eval 0.7 has no", "Table 5: Training-free inference", "1534.1"):
        assert words in result.stdout


def suite(*arguments: str | Path) -> Any:
    from typer.testing import CliRunner

    from pyramiddrop.cli.main import app

    return CliRunner().invoke(app, ["eval", "--suite", "paper", *map(str, arguments)])


def run_json_suite(*arguments: str | Path) -> dict[str, Any]:
    result = suite(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_the_suite_beside_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(RAW))
    record = run_json_suite("--results", tmp_path / "raw.json")
    assert record["measured"][0]["scores"]["docvqa"] == {"value": 70, "error": 1}
    table = suite("--results", tmp_path / "raw.json").stdout
    assert "70.0 ± 1.0" in table
    assert "45.0 % of vanilla" in table


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"methods": [{"name": "vanilla"}]}', '{"results": {}}'])
def test_results_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        read_measured(tmp_path)


def test_a_folder_without_results_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results of lmms-eval in"):
        read_measured(tmp_path)
    assert_one_line(suite("--results", tmp_path / "none.json"), "no such file")


def test_tasks_run_under_vanilla_and_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def fake(model: str, method: Any, tasks: list[str], limit: Any, batch: int, *rest: Any) -> dict[str, Any]:
        told.append((model, method, tasks, limit, batch))
        print("what lmms-eval prints")
        return RAW

    monkeypatch.setattr(benchmarks, "check_installed", lambda: None)
    monkeypatch.setattr(benchmarks, "run_tasks", fake)
    words = ["--tasks", "mme,docvqa_val", "--model", "some/model", "--limit", "3", "--method", "pyramiddrop:lam=0.4"]
    record = run_json(*words, "--output", tmp_path)
    assert told == [("some/model", method, ["mme", "docvqa_val"], 3, 1) for method in (None, PyramidDrop(lam=0.4))]
    assert [way["name"] for way in record["methods"]] == ["vanilla", "PyramidDrop(lam=0.4)"]
    assert [one.name for one in read_measured(tmp_path)] == ["vanilla", "PyramidDrop(lam=0.4)"]
    assert "0.700 ± 0.010" in run(*words).stdout
    beside = run_json_suite("--output", tmp_path)["measured"]
    assert [one["scores"]["mme"]["value"] for one in beside] == [1500, 1500]


def test_of_several_processes_one_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "check_installed", lambda: None)
    monkeypatch.setattr(benchmarks, "run_tasks", lambda *arguments: {})
    result = run("--tasks", "mme", "--json")
    assert (result.exit_code, result.stdout) == (0, "")


def test_where_lmms_eval_is_not_installed_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyramiddrop.evaluation.lmms.run.find_spec", lambda name: None)
    assert_one_line(run("--tasks", "mme"), "lmms-eval is not installed: pip install 'pyramiddrop[eval]'")
    with pytest.raises(InputError, match="not installed"):
        run_benchmarks(["mme"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--suite video", "--suite must be paper or budgets; got 'video'"),
        ("--suite paper --model x", "--model means nothing with --suite"),
        ("--tasks digits,mme", "digits is not a task of lmms-eval: give --tasks digits alone"),
        ("--tasks mme --percent 50", "--percent means nothing with tasks of lmms-eval"),
        ("--tasks mme --split val", "--split means nothing with tasks of lmms-eval"),
        ("--results x.json", "--results means nothing with --tasks digits"),
    ],
)
def test_options_that_do_not_belong(arguments: str, words: str) -> None:
    from typer.testing import CliRunner

    from pyramiddrop.cli.main import app

    assert_one_line(CliRunner().invoke(app, ["eval", *arguments.split()]), words)


# --- Budgets --------------------------------------------------------------------------------------------------------


def test_every_published_row_says_who_printed_it_and_how_good_it_is() -> None:
    rows = published_rows()
    assert len(rows) > 100
    for row in rows:
        assert row.source, row
        assert row.version, row
        assert row.scores or row.percent, row
        assert row.schedule or row.method not in ("PyramidDrop", "HiDrop"), row
        if row.mean:
            assert float(row.percent) == pytest.approx(100 * float(row.mean) / float(row.full), abs=0.06), row


def budgets(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["eval", "--suite", "budgets", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_rows_that_contradict_each_other_stand_side_by_side() -> None:
    printed = budgets()
    at_64 = printed.split("LLaVA-1.5-7B at 64 average tokens")[1].split("LLaVA-1.5-7B at 48")[0]
    rows = [line for line in at_64.splitlines() if line.startswith("PyramidDrop ")]
    assert [value for value in ("74.4", "82.7", "72.4", "77.0") if any(f" {value} " in row for row in rows)] == [
        "74.4",
        "82.7",
        "72.4",
        "77.0",
    ]
    assert "PyramidDrop, trained" in at_64
    assert " *" in at_64
    assert "Measured" not in printed


def test_what_was_measured_stands_above(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(benchmarks.benchmarks_record([MEASURED], None)))
    printed = budgets("--results", path)
    measured = printed.split("LLaVA-1.5-7B at 192")[0]
    assert "Measured" in measured
    assert "1500.0" in measured
    assert "45 % of vanilla" in measured
    record = json.loads(budgets("--results", path, "--json"))
    assert record["measured"][0]["scores"] == {"mme": 1500.0}
    assert len(record["published"]) == len(published_rows())
    (row,) = [one for one in record["published"] if (one["method"], one["budget"]) == ("HiDrop", 64)]
    assert (row["percent"], row["mean"], row["second_hand"]) == (98.3, None, True)
