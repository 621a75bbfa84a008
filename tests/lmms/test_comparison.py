"""benchmarks/comparison with a task of lmms-eval: a process of its own, then a result and a panel of the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from digits_task import TASK, samples

from pyramiddrop import FastV
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.store import write_json
from pyramiddrop.evaluation.tasks import same
from pyramiddrop.inference.checkpoint import load_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from comparison import run_experiments as runner


def test_a_model_and_a_task_are_added_run_and_kept(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = {"task": "reader", "method": "fastv:layer=1,keep=0.1"}
    write_json(tmp_path / "experiments" / "reader" / "fast.json", reader)
    words = ["--model", str(digits_checkpoint()), "--tasks", TASK, "--limit", "8", "--batch", "4", "--device", "cpu"]
    words += ["--include", str(tasks), "--only", f"{digits_checkpoint().name}-{TASK}"]
    assert runner.main(words, tmp_path, tmp_path / "kept") == 0
    [one] = [found for found in runner.read_experiments(tmp_path) if found.board != "reader"]
    record = runner.read_result(tmp_path, one)
    assert record is not None
    asked = samples()[:8]
    answerer = Answerer(load_checkpoint(digits_checkpoint(), "cpu"), max_new_tokens=5)
    replies = answerer.answers(asked, FastV(layer=1, keep=0.1))
    right = [same(reply.text, sample.answers) for reply, sample in zip(replies, asked, strict=True)]
    [own] = record["methods"]
    assert own["scores"][TASK]["right"]["value"] == sum(right) / 8
    spent, plain = (sum(getattr(one, name).flops for one in replies) for name in ("usage", "vanilla"))
    assert own["costs"]["flops_ratio"] == pytest.approx(spent / plain)
    assert runner.main(words, tmp_path, tmp_path / "kept") == 0
    assert "1 of 1 experiments have a result" in capsys.readouterr().out
