"""`pyramiddrop eval --tasks` on lmms-eval's own evaluator: vanilla and methods in turn, with scores of each."""

from __future__ import annotations

from pathlib import Path

from digits_task import TASK, samples

from pyramiddrop import FastV
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.lmms.run import read_measured, run_benchmarks
from pyramiddrop.evaluation.tasks import same
from pyramiddrop.inference.checkpoint import load_checkpoint


def test_methods_take_turns_and_score_as_we_do(tasks: Path, tmp_path: Path) -> None:
    words = "fastv:layer=1,keep=0.1"
    found = run_benchmarks([TASK], [words], batch=8, device="cpu", output=tmp_path, include=tasks)
    answerer = Answerer(load_checkpoint(digits_checkpoint(), "cpu"), max_new_tokens=5)
    for one, method in zip(found, (None, FastV(layer=1, keep=0.1)), strict=True):
        replies = answerer.answers(samples(), method)
        right = [same(reply.text, sample.answers) for reply, sample in zip(replies, samples(), strict=True)]
        assert one.scores[TASK]["right"].value == sum(right) / len(right)
    assert [one.name for one in found] == ["vanilla", "FastV(layer=1, keep=0.1)"]
    assert found[0].costs["flops_ratio"] == 1 > found[1].costs["flops_ratio"]
    assert {one.name for one in read_measured(tmp_path)} == {"method=vanilla", "method=fastv,layer=1,keep=0.1"}
