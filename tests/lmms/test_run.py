"""lmms-eval's own evaluator on the bundled model: its scores and every answer equal ours, however it is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from digits_task import LONGEST, TASK, expected, samples

from pyramiddrop import FastV, Method, PyramidDrop, VisionDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer, Reply
from pyramiddrop.evaluation.lmms import run as run_module
from pyramiddrop.evaluation.lmms.run import run_tasks
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import load_checkpoint

DIGITS = str(digits_checkpoint())
METHODS = {
    "vanilla": None,
    "pyramiddrop": PyramidDrop(),
    "fastv": FastV(layer=2, keep=0.25),
    "composed": VisionDrop(keep=0.5) | PyramidDrop(layers=[3, 6], keep=[0.5, 0.0]),
}


@cache
def ours(name: str) -> list[Reply]:
    checkpoint = load_checkpoint(DIGITS, device="cpu")
    return Answerer(checkpoint, batch=16, max_new_tokens=LONGEST).answers(samples(), METHODS[name])


def texts(name: str) -> list[str]:
    return [reply.text for reply in ours(name)]


def written(output: Path) -> tuple[dict[str, Any], list[str]]:
    """The results that lmms-eval wrote, and the answers in the order of the questions."""
    [results], [answers] = list(output.rglob("*results.json")), list(output.rglob("*samples_*.jsonl"))
    lines = sorted(map(json.loads, answers.read_text().splitlines()), key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), [line["filtered_resps"] for line in lines]


def check_costs(results: dict[str, Any], name: str, count: int | None = None) -> None:
    replies, throughput = ours(name)[:count], results["throughput"]
    flops, plain = sum(one.usage.flops for one in replies), sum(one.vanilla.flops for one in replies)
    memory, whole = sum(one.usage.kv_bytes for one in replies), sum(one.vanilla.kv_bytes for one in replies)
    assert throughput["avg_requests_measured"] == len(replies)
    assert throughput["avg_flops_ratio"] == pytest.approx(flops / plain)
    assert throughput["avg_kv_ratio"] == pytest.approx(memory / whole)
    assert throughput["avg_prefill_flops"] == pytest.approx(flops / len(replies))
    assert throughput["avg_kv_bytes"] == pytest.approx(memory / len(replies))
    assert throughput[f"avg_flops_ratio/{TASK}"] == throughput["avg_flops_ratio"]


def lmms_eval_in_two(tasks: Path, *words: str) -> None:
    """The command line, as a user starts it for two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "lmms_eval", "--model", "pyramiddrop", "--tasks", TASK]
    done = subprocess.run(
        [*command, "--include_path", str(tasks), "--device", "cpu", "--log_samples", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert "Throughput Summary" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_scores_answers_and_costs_equal_ours(tasks: Path, tmp_path: Path) -> None:
    """With lmms-eval's own LLaVA class, which "auto" takes here."""
    results = run_tasks(DIGITS, PyramidDrop(), [TASK], output=tmp_path, device="cpu", include=tasks)
    saved, answers = written(tmp_path)
    assert answers == texts("pyramiddrop") != texts("vanilla")
    assert results["results"][TASK]["right,none"] == pytest.approx(expected(texts("pyramiddrop")))
    assert saved["results"] == results["results"]
    check_costs(saved, "pyramiddrop")
    assert saved["throughput"]["avg_visual_tokens"] == 64
    assert saved["throughput"]["avg_retained_visual_tokens"] == (64 + 32 + 16 + 8) / 4


def test_a_composition_is_told_in_words_without_a_comma(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a text of model arguments, as a user writes it; and written by ourselves, as `eval --tasks` does."""
    run_tasks(DIGITS, METHODS["composed"], [TASK], limit=16, output=tmp_path / "ours", device="cpu", include=tasks)
    saved, answers = written(tmp_path / "ours")
    assert answers == texts("composed")[:16] != texts("vanilla")[:16]
    check_costs(saved, "composed", 16)
    assert saved["throughput"]["avg_retained_visual_tokens"] == (3 * 32 + 3 * 16 + 2 * 0) / 8
    arguments = f"pretrained={DIGITS},method=vision:keep=0.5|pyramiddrop:layers=3/6:keep=0.5/0"
    words = ["--model", "pyramiddrop", "--model_args", arguments, "--tasks", TASK, "--limit", "16", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *words, "--include_path", str(tasks)])
    told = run_module._evaluate()
    assert told["results"] == saved["results"]


def test_two_processes_equal_one(tasks: Path, tmp_path: Path) -> None:
    """From the command line, and with our own class, which "auto" takes here.

    Of an odd number of questions lmms-eval gives the second process one twice, which must not count.
    """
    arguments = f"pretrained={DIGITS},method=fastv,layer=2,keep=0.25"
    words = ["--model_args", arguments, "--output_path", str(tmp_path), "--batch_size", "4", "--limit", "25"]
    lmms_eval_in_two(tasks, *words)
    results, answers = written(tmp_path)
    assert answers == texts("fastv")[:25] != texts("vanilla")[:25]
    assert results["results"][TASK]["right,none"] == pytest.approx(
        sum(text in one.answers for text, one in zip(answers, samples(), strict=False)) / 25
    )
    check_costs(results, "fastv", 25)


def test_cached_responses_are_those_of_the_same_method(tasks: Path, tmp_path: Path) -> None:
    def run(method: Method | None, name: str) -> tuple[dict[str, Any], list[str]]:
        output = tmp_path / name
        options = {"cache": tmp_path / "cache", "output": output, "device": "cpu", "include": tasks}
        run_tasks(DIGITS, method, [TASK], limit=16, **options)
        return written(output)

    first, answers = run(PyramidDrop(), "first")
    again, repeated = run(PyramidDrop(), "again")
    other, others = run(None, "other")
    assert answers == repeated == texts("pyramiddrop")[:16]
    assert others == texts("vanilla")[:16]
    assert first["throughput"]["avg_requests_measured"] == 16
    assert "avg_flops_ratio" not in again.get("throughput", {})
    assert other["throughput"]["avg_flops_ratio"] == 1


def test_a_task_given_as_a_folder_is_refused(tasks: Path) -> None:
    with pytest.raises(InputError, match="--include_path"):
        run_tasks(DIGITS, None, [str(tasks)], limit=1, device="cpu")


def test_a_task_that_compares_likelihoods_is_refused(tasks: Path, tmp_path: Path) -> None:
    lines = (tasks / f"{TASK}.yaml").read_text().replace(TASK, "likely").replace("generate_until", "loglikelihood")
    kept = [line for line in lines.splitlines() if "generation_kwargs" not in line and "max_new_tokens" not in line]
    (tmp_path / "likely.yaml").write_text("\n".join(kept))
    (tmp_path / "functions.py").write_text((tasks / "functions.py").read_text())
    with pytest.raises(InputError, match="compares likelihoods"):
        run_tasks(DIGITS, None, ["likely"], limit=1, device="cpu", include=tmp_path)


def test_unknown_tasks_are_named(tasks: Path) -> None:
    with pytest.raises(InputError, match="Tasks not found: no_such_task; "):
        run_tasks(DIGITS, None, ["no_such_task"], include=tasks, device="cpu")
    assert sys.argv[0] != "lmms-eval"
