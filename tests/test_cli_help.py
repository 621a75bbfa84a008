"""The command line helps: examples, a mistyped folder, and what a stopped command says."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from documents import parse
from pyramiddrop.cli import EXAMPLES
from pyramiddrop.cli.main import app

VERBS: Any = typer.main.get_command(app)
STUDIES = sorted(VERBS.commands["study"].commands)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, words, env={"COLUMNS": "80"})


def test_every_verb_has_examples() -> None:
    assert sorted(EXAMPLES) == sorted([*VERBS.commands, *STUDIES])


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_ends_in_two_examples_that_are_right(verb: str) -> None:
    words = ["study", verb] if verb in STUDIES else [verb]
    lines = [line.strip() for line in run(*words, "--help").output.splitlines() if line.strip()]
    assert lines[-3:] == ["Examples:", *EXAMPLES[verb]]  # none is cut at 80 columns
    for example in EXAMPLES[verb]:
        assert example.startswith(f"pyramiddrop {' '.join(words)}")
        parse(shlex.split(example)[1:])


# --- A mistyped folder ----------------------------------------------------------------------------------------------


def test_a_path_that_is_not_there_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "other").mkdir(parents=True)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    for source in ("runs/mine", "runs/mine/deeper", "nowhere/at/all", "./mine"):
        result = run("cost", "--model", source)
        assert (result.exit_code, result.stderr) == (2, f"error: no such folder: {source}\n")


def test_what_may_be_a_name_on_the_hub_is_said_to_be_no_folder_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise OSError("nobody has that")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    [line] = run("cost", "--model", "nobody/nothing").stderr.splitlines()
    assert line.startswith("error: no such folder: nobody/nothing, and no checkpoint of that name can be read from the")
    assert line.endswith("nobody has that")


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------

AGAIN = "the same command goes on where it stopped"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--output", "{folder}/out"], f"stopped; {AGAIN}"),
        (["eval"], f"stopped; with --output FOLDER {AGAIN}"),
        (["study", "ablation", "--output", "{folder}/out"], f"stopped; {AGAIN}"),
        (["train", "--model", "m", "--data", "d", "--output", "{folder}"], "stopped; the same command with --resume"),
        (["bench"], "stopped"),
    ],
)
def test_a_stopped_command_says_how_to_go_on(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # First the studies, which import the evaluator, and would keep the one that stops.
    monkeypatch.setattr("pyramiddrop.evaluation.studies.method_studies.prepare_ablation", stop)
    for place in ("evaluation.run.Evaluator", "training.run.prepare_training", "speed.bench.prepare_bench"):
        monkeypatch.setattr(f"pyramiddrop.{place}", stop)
    result = run(*(word.format(folder=tmp_path) for word in words))
    assert result.exit_code == 130
    said = result.stderr.splitlines()[-1]
    assert said == message if message == "stopped" else said.startswith(message)


def test_benchmarks_of_lmms_eval_ask_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyramiddrop.evaluation.lmms.run.run_benchmarks", stop)
    result = run("eval", "--tasks", "mme", "--output", str(tmp_path))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "stopped")
