"""Owns the redundancy study of one model (the paper's Figures 1 and 3): one drop, tried at every layer and share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.store import Store
from pyramiddrop.evaluation.studies.attention import crowd, on_picture
from pyramiddrop.evaluation.studies.grid import Grid, single_drop
from pyramiddrop.evaluation.studies.hearing import Heard, hear
from pyramiddrop.evaluation.studies.pieces import Pieces
from pyramiddrop.evaluation.studies.redundancy_record import redundancy_record
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.hf import anatomy
from pyramiddrop.hf.prefix import Prefix
from pyramiddrop.inference.answer import on_model
from pyramiddrop.inference.usage import batch_usage, known
from pyramiddrop.trace import Trace

Piece = dict[str, Any]


@dataclass(frozen=True)
class Redundancy:
    """The study of one model.

    Attributes:
        name, source: of the model in the study, and where it came from.
        task: its samples need no answers.
        share: whether the layers before a drop run once for all shares where they can. The numbers are the same.
    """

    name: str
    source: str
    answerer: Answerer
    task: Task
    grid: Grid
    share: bool = True

    @property
    def steps(self) -> int:
        """How often a batch is answered, in all."""
        return -(-len(self.task.samples) // self.answerer.batch) * (1 + len(self.grid.cells))

    def run(self, folder: Path, advance: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
        """The record of the study; what `folder` holds of it already is not measured again.

        Args:
            advance: told how many steps are done.

        Raises:
            InputError: where the folder cannot be used.
        """
        samples, batch = self.task.samples, self.answerer.batch
        key = {**Store(folder, self.answerer, samples).shared, "layers": self.grid.layers, "keep": self.grid.keep}
        pieces = Pieces(folder, "redundancy", key)
        for start in range(0, len(samples), batch):
            if str(start) in pieces.done:
                advance(1 + len(self.grid.cells))
            else:
                pieces.add(str(start), self._measure(samples[start : start + batch], advance))
        about = {"name": self.name, "source": self.source, "num_layers": self.answerer.checkpoint.num_layers}
        return {**about, **redundancy_record(self.task, self.grid, list(pieces.done.values()))}

    @cached_property
    def shared(self) -> bool:
        """Whether prefills start from a recorded one: tried on the first sample, it must give the same to the bit."""
        parts, layer, keep = anatomy(self._model), self.grid.layers[-1], self.grid.keep[-1]
        if not self.share or not Prefix.can_share(parts):
            return False
        inputs, prefix = self._inputs(self.task.samples[:1]), Prefix(parts, [layer])
        with prefix.recorded():
            self._hear(inputs)
        whole, _ = self._hear_cell(inputs, layer, keep, None)
        short, _ = self._hear_cell(inputs, layer, keep, prefix)
        return torch.equal(whole.logits, short.logits) and whole.texts == short.texts

    def _measure(self, samples: Sequence[Sample], advance: Callable[[int], None]) -> Piece:
        """What a batch says without a drop and in every cell, and what it looks at: a value a sample."""
        inputs = self._inputs(samples)
        prefix = Prefix(anatomy(self._model), self.grid.layers) if self.shared else None
        with prefix.recorded() if prefix else nullcontext():
            full = self._hear(inputs)
        advance(1)
        cells: list[Piece] = []
        looks: dict[int, list[Tensor] | None] = {}
        for layer, keep in self.grid.cells:
            heard, trace = self._hear_cell(inputs, layer, keep, prefix)
            used = batch_usage(self._model, inputs, single_drop(layer, keep), trace)
            flops = [known(one.flops) for one in used]
            cells.append({"answers": heard.texts, "flops": flops, **heard.next_token(full)})
            looks[layer] = trace.stages[0].scores or looks.get(layer)
            advance(1)
        return {
            "shared": self.shared,
            "answers": full.texts,
            "flops": [known(one.flops) for one in batch_usage(self._model, inputs)],
            "visual_tokens": trace.visual_tokens,
            "cells": cells,
            "attention": [
                {"layer": layer, "picture": [*map(on_picture, scores)], "crowd": [*map(crowd, scores)]}
                for layer, scores in looks.items()
                if scores is not None
            ],
        }

    @property
    def _model(self) -> Any:
        return self.answerer.checkpoint.model

    def _inputs(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        return on_model(self._model, self.answerer.inputs(samples))

    def _hear(self, inputs: Mapping[str, Any]) -> Heard:
        return hear(self.answerer.checkpoint, inputs, self.answerer.max_new_tokens)

    def _hear_cell(
        self, inputs: Mapping[str, Any], layer: int, keep: float, prefix: Prefix | None
    ) -> tuple[Heard, Trace]:
        """What the model says with one drop, and the trace of its prefill."""
        replay = prefix.replayed(layer) if prefix else nullcontext()
        with single_drop(layer, keep)(self._model) as trace, replay:
            return self._hear(inputs), trace
