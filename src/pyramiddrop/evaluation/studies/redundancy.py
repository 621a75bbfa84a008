"""The redundancy study (the paper's Figures 1 and 3): a single drop at every layer and keep ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.evaluation.agreement import Generation, generate_with_logits
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.prefill_replay import PrefillReplay, replays_exactly
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.store import Journal, Store
from pyramiddrop.evaluation.studies.attention import (
    AttentionExample,
    attention_concentration,
    attention_examples,
    attention_on_picture,
    pick_samples,
)
from pyramiddrop.evaluation.studies.inputs import DEFAULT_KEEP, Grid, StudyModel, make_grid, single_drop
from pyramiddrop.evaluation.studies.redundancy_record import redundancy_record
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.hf import inspect_model
from pyramiddrop.inference import user_input
from pyramiddrop.inference.prefill_stats import batch_usage, none_if_nan
from pyramiddrop.inference.prompt import on_model
from pyramiddrop.speed.record import machine
from pyramiddrop.trace import Trace

BatchRecord = dict[str, Any]


@dataclass(frozen=True)
class Redundancy:
    """The study of one model.

    Attributes:
        name, source: the model's name in the study, and its folder or name on the hub.
        task: the questions, which need no answers.
        share: True to run the layers before a drop once for all keep ratios, if possible; the numbers are the same.
    """

    name: str
    source: str
    answerer: Answerer
    task: Task
    grid: Grid
    share: bool = True

    @property
    def steps(self) -> int:
        """The total number of answered batches."""
        return -(-len(self.task.samples) // self.answerer.batch) * (1 + len(self.grid.cells))

    def run(self, folder: Path, advance: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
        """Run the study and return its record; results in `folder` are reused.

        Args:
            advance: called with the number of steps that were done.

        Raises:
            InputError: if the folder cannot be used.
        """
        samples, batch = self.task.samples, self.answerer.batch
        key = {**Store(folder, self.answerer, samples).shared, "layers": self.grid.layers, "keep": self.grid.keep}
        journal = Journal(folder, "redundancy", key)
        measured = journal.entries()
        journal.keep(measured)
        advance(len(measured) * (1 + len(self.grid.cells)))
        for start in range(len(measured) * batch, len(samples), batch):
            measured.append(self._measure(samples[start : start + batch], advance))
            journal.append(measured[-1:])
        about = {"name": self.name, "source": self.source, "num_layers": self.answerer.checkpoint.num_layers}
        return {**about, **redundancy_record(self.task, self.grid, measured)}

    @cached_property
    def shared(self) -> bool:
        """True if prefills can be replayed: on the first sample, a replayed one must be bit-identical."""
        layer, keep = self.grid.layers[-1], self.grid.keep[-1]
        inputs, tokens = self._inputs(self.task.samples[:1]), self.answerer.max_new_tokens
        method = single_drop(layer, keep)
        return self.share and replays_exactly(self.answerer.checkpoint, inputs, method, layer, tokens)

    def _measure(self, samples: Sequence[Sample], advance: Callable[[int], None]) -> BatchRecord:
        """The answers of a batch without dropping and in every cell, and its attention: a value for each sample."""
        inputs = self._inputs(samples)
        replay = PrefillReplay(inspect_model(self._model), self.grid.layers) if self.shared else None
        with replay.recorded() if replay else nullcontext():
            full = self._generate(inputs)
        advance(1)
        cells: list[dict[str, Any]] = []
        looks: dict[int, list[Tensor] | None] = {}
        for layer, keep in self.grid.cells:
            generation, trace = self._generate_cell(inputs, layer, keep, replay)
            used = batch_usage(self._model, inputs, single_drop(layer, keep), trace)
            flops = [none_if_nan(one.flops) for one in used]
            cells.append({"answers": generation.texts, "flops": flops, **generation.next_token(full)})
            looks[layer] = trace.stages[0].scores or looks.get(layer)
            advance(1)
        return {
            "shared": self.shared,
            "answers": full.texts,
            "flops": [none_if_nan(one.flops) for one in batch_usage(self._model, inputs)],
            "visual_tokens": trace.visual_tokens,
            "cells": cells,
            "attention": [
                {
                    "layer": layer,
                    "picture": [*map(attention_on_picture, scores)],
                    "crowd": [*map(attention_concentration, scores)],
                }
                for layer, scores in looks.items()
                if scores is not None
            ],
        }

    @property
    def _model(self) -> Any:
        return self.answerer.checkpoint.model

    def _inputs(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        return on_model(self._model, self.answerer.inputs(samples))

    def _generate(self, inputs: Mapping[str, Any]) -> Generation:
        return generate_with_logits(self.answerer.checkpoint, inputs, self.answerer.max_new_tokens)

    def _generate_cell(
        self, inputs: Mapping[str, Any], layer: int, keep: float, replay: PrefillReplay | None
    ) -> tuple[Generation, Trace]:
        """The generation with a single drop, and the trace of its prefill."""
        replayed = replay.replayed(layer) if replay else nullcontext()
        with single_drop(layer, keep)(self._model) as trace, replayed:
            return self._generate(inputs), trace


#: Called with a description and the number of steps; returns a function to call with the number of finished ones.
Begin = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class RedundancyOptions:
    """The options; `layers` and `keep` None take those of `grid`, and `examples` is the number of drawn prompts."""

    models: Sequence[StudyModel]
    layers: Sequence[int] | None = None
    keep: Sequence[float] | None = None
    batch: int = 16
    max_new_tokens: int = 32
    examples: int = 2
    device: str | None = None
    dtype: str | None = None


def run_redundancy(
    task: Task, options: RedundancyOptions, folder: Path, begin: Begin
) -> tuple[dict[str, Any], list[AttentionExample]]:
    """Run the study and return its record, and examples of its first model; results in `folder` are reused.

    Raises:
        InputError: if an option cannot be used.
    """
    for model in options.models:
        model.check()
    record: dict[str, Any] = {"study": "redundancy", "setting": _setting(task, options), "models": []}
    examples: list[AttentionExample] = []
    for number, model in enumerate(options.models):
        checkpoint = model.load(options.device, options.dtype)
        grid = make_grid(inspect_model(checkpoint.model), options.layers, options.keep)
        answerer = Answerer(checkpoint, options.batch, options.max_new_tokens)
        study = Redundancy(model.name, model.source, answerer, task, grid)
        with user_input():
            record["models"].append(study.run(folder, begin(model.name, study.steps)))
        if number == 0:
            picked = pick_samples(task.samples, options.examples)
            examples = attention_examples(checkpoint, picked, grid.layers, options.max_new_tokens)
            record["machine"] = machine(checkpoint.model.device, torch.get_num_threads())
    return record, examples


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
