"""Measures on the bundled model what docs/studies.md says beside the studies; writes benchmarks/results.

    python benchmarks/studies.py prefix                            # what sharing the layers before a drop saves
    python benchmarks/studies.py planned runs/val/profile.json     # schedules made of a profile, on other questions

The profile is that of `pyramiddrop study redundancy --split val --limit 640 --output runs/val`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyramiddrop import Method, PyramidDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.cost import ModelShape, Prompt
from pyramiddrop.evaluation import budgets
from pyramiddrop.evaluation.answering import Answerer, Reply
from pyramiddrop.evaluation.scores import Array, difference, score
from pyramiddrop.evaluation.studies.redundancy import Redundancy, make_grid
from pyramiddrop.evaluation.tasks import Task, digits_task
from pyramiddrop.hf import inspect_model
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.planning import Budget, Profile, plan
from pyramiddrop.speed.record import machine

RESULTS = Path(__file__).parent / "results"
PERCENTS = (50.0, 60.0, 70.0, 80.0)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefix", "planned"))
    parser.add_argument("profile", type=Path, nargs="?", help="of planned")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure_prefix() if arguments.what == "prefix" else measure_planned(Profile.read(arguments.profile))
    found = {"study": arguments.what, **found, "machine": machine(torch.device("cpu"), 1)}
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / f"study-{arguments.what}.json").write_text(text, "utf-8")
    print(text)


def measure_prefix() -> dict[str, Any]:
    """CPU seconds of the whole grid over 64 questions, with and without sharing, for answers and for next tokens."""
    task, checkpoint = digits_task(limit=64), load_checkpoint(digits_checkpoint(), "cpu")
    grid = make_grid(inspect_model(checkpoint.model))
    found: dict[str, Any] = {"questions": len(task.samples), "cells": len(grid.cells), "seconds": {}}
    for tokens in (32, 1):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        records = {}
        for _ in range(ROUNDS):
            for share in seconds:
                study = Redundancy("digits", "bundled", Answerer(checkpoint, 64, tokens), task, grid, share)
                with tempfile.TemporaryDirectory() as folder:
                    start = time.process_time()
                    records[share] = {**study.run(Path(folder)), "shared_prefix": None}
                    seconds[share].append(time.process_time() - start)
        assert records[False] == records[True], "sharing changed a number"
        whole, shared = (round(float(np.median(seconds[share])), 2) for share in (False, True))
        found["seconds"]["next tokens" if tokens == 1 else "whole answers"] = {"plain": whole, "shared": shared}
    return found


def measure_planned(profile: Profile) -> dict[str, Any]:
    """For several budgets: the schedule that the profile gives, and equal stages that cost the same."""
    task, checkpoint = digits_task(), load_checkpoint(digits_checkpoint(), "cpu")
    shape, answerer = inspect_model(checkpoint.model).shape, Answerer(checkpoint, 64)
    clusters = [sample.cluster for sample in task.samples]
    vanilla, replies = ask(answerer, task, None)
    prompts = [Prompt(reply.usage.visual_tokens, reply.usage.text_tokens) for reply in replies]
    usual = Prompt(prompts[0].visual_tokens, round(float(np.mean([prompt.text_tokens for prompt in prompts]))))
    rows = []
    for percent in PERCENTS:
        planned = plan(ModelShape(shape), usual, Budget(percent=percent), profile=profile)
        right, used = ask(answerer, task, PyramidDrop(**planned.arguments))
        spent = 100 * flops_ratio(used)
        equal = budgets.Budget(budgets.PERCENT, spent).solve(PyramidDrop(), shape, prompts)
        equal_right, equal_used = ask(answerer, task, equal)
        rows.append(
            {
                "budget": percent,
                "planned": planned.line,
                "predicted_loss": planned.loss,
                "flops_percent": spent,
                "loss": vars(difference(vanilla, right, clusters)),
                "accuracy": vars(score(right, clusters)),
                "equal_stages": f"PyramidDrop(lam={equal.lam})",
                "equal_flops_percent": 100 * flops_ratio(equal_used),
                "equal_accuracy": vars(score(equal_right, clusters)),
                "difference": vars(difference(right, equal_right, clusters)),
            }
        )
    return {"questions": len(task.samples), "vanilla": vars(score(vanilla, clusters)), "rows": rows}


def ask(answerer: Answerer, task: Task, method: Method | None) -> tuple[Array, list[Reply]]:
    """(N,) whether each answer is right, and the replies."""
    replies = answerer.answers(task.samples, method)
    pairs = zip(replies, task.samples, strict=True)
    return np.array([float(reply.text in sample.answers) for reply, sample in pairs]), replies


def flops_ratio(replies: list[Reply]) -> float:
    """Decoder FLOPs of vanilla's."""
    return sum(reply.usage.flops for reply in replies) / sum(reply.vanilla.flops for reply in replies)


if __name__ == "__main__":
    main()
