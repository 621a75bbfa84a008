"""Owns a whole redundancy study: models one after the other, to one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.studies.glances import Glance, pick_samples, take_glances
from pyramiddrop.evaluation.studies.grid import DEFAULT_KEEP, make_grid
from pyramiddrop.evaluation.studies.redundancy import Redundancy
from pyramiddrop.evaluation.studies.subjects import Named
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.hf import anatomy
from pyramiddrop.inference.errors import user_input
from pyramiddrop.speed.record import machine

#: Told what begins and how many steps it has; gives what is told how many of them are done.
Begin = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class RedundancyOptions:
    """What was asked for; `layers` and `keep` None take those of `grid`, `glances` is how many prompts are drawn."""

    models: Sequence[Named]
    layers: Sequence[int] | None = None
    keep: Sequence[float] | None = None
    batch: int = 16
    max_new_tokens: int = 32
    glances: int = 2
    device: str | None = None
    dtype: str | None = None


def run_redundancy(
    task: Task, options: RedundancyOptions, folder: Path, begin: Begin
) -> tuple[dict[str, Any], list[Glance]]:
    """The record of the study, and glances of its first model. What `folder` holds already is not measured again.

    Raises:
        InputError: for anything that was asked for and cannot be done.
    """
    for model in options.models:
        model.check()
    record: dict[str, Any] = {"study": "redundancy", "setting": _setting(task, options), "models": []}
    glances: list[Glance] = []
    for number, model in enumerate(options.models):
        checkpoint = model.load(options.device, options.dtype)
        grid = make_grid(anatomy(checkpoint.model), options.layers, options.keep)
        answerer = Answerer(checkpoint, options.batch, options.max_new_tokens)
        study = Redundancy(model.name, model.source, answerer, task, grid)
        with user_input():
            record["models"].append(study.run(folder, begin(model.name, study.steps)))
        if number == 0:
            picked = pick_samples(task.samples, options.glances)
            glances = take_glances(checkpoint, picked, grid.layers, options.max_new_tokens)
            record["machine"] = machine(checkpoint.model.device, torch.get_num_threads())
    return record, glances


def _setting(task: Task, options: RedundancyOptions) -> dict[str, Any]:
    return {
        "task": task.name,
        **task.about,
        "match": task.match,
        "models": {model.name: model.source for model in options.models},
        "layers": options.layers or "each eighth of the depth",
        "keep": options.keep or DEFAULT_KEEP,
        "batch": options.batch,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype or "by device",
    }
