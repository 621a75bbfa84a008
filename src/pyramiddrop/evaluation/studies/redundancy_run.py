"""Owns a whole redundancy study: models one after the other, in one journal, to one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyramiddrop.evaluation.studies.glances import Glance, pick_samples, take_glances
from pyramiddrop.evaluation.studies.grid import DEFAULT_KEEP, make_grid
from pyramiddrop.evaluation.studies.journal import Journal
from pyramiddrop.evaluation.studies.redundancy import Redundancy
from pyramiddrop.evaluation.studies.subjects import Named, SampleOptions, named_match
from pyramiddrop.hf import anatomy
from pyramiddrop.speed.record import machine

JOURNAL = "redundancy.jsonl"

#: Told what begins and how many steps it has; gives what is told how many of them are done.
Begin = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class RedundancyOptions:
    """What was asked for; `layers` and `keep` None take those of `grid`, `glances` is how many prompts are drawn."""

    models: Sequence[Named]
    samples: SampleOptions = field(default_factory=SampleOptions)
    layers: Sequence[int] | None = None
    keep: Sequence[float] | None = None
    match: str = "exact"
    batch: int = 16
    max_new_tokens: int = 32
    glances: int = 2
    device: str | None = None
    dtype: str | None = None


def run_redundancy(options: RedundancyOptions, folder: Path, begin: Begin) -> tuple[dict[str, Any], list[Glance]]:
    """The record of the study, and glances of its first model. What is done already is in the journal in `folder`.

    Raises:
        InputError: for anything that was asked for and cannot be done.
    """
    match, samples = named_match(options.match), options.samples.samples()
    for model in options.models:
        model.check()
    setting = {**_setting(options), **options.samples.about(samples)}
    journal = Journal(folder / JOURNAL, setting)
    record: dict[str, Any] = {"study": "redundancy", "setting": setting, "models": []}
    glances: list[Glance] = []
    for model in options.models:
        checkpoint = model.load(options.device, options.dtype)
        grid = make_grid(anatomy(checkpoint.model), options.layers, options.keep)
        study = Redundancy(
            model.name, model.source, checkpoint, samples, grid, match, options.batch, options.max_new_tokens
        )
        record["models"].append(study.run(journal, begin(model.name, study.steps)))
        if not glances:
            picked = pick_samples(samples, options.glances)
            glances = take_glances(checkpoint, picked, grid.layers, options.max_new_tokens)
            record["machine"] = machine(checkpoint.model.device, torch.get_num_threads())
    return record, glances


def _setting(options: RedundancyOptions) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "models": {model.name: model.source for model in options.models},
        "layers": options.layers or "an eighth of the depth each",
        "keep": options.keep or DEFAULT_KEEP,
        "match": options.match,
        "batch": options.batch,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype or "by device",
    }
