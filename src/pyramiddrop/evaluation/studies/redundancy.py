"""Owns the redundancy study of one model (the paper's Figures 1 and 3): one drop, tried at every layer and share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyramiddrop.evaluation.matching import Match
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.studies.attention import crowd, on_picture
from pyramiddrop.evaluation.studies.grid import Grid, single_drop
from pyramiddrop.evaluation.studies.hearing import LABEL_FREE, Heard, hear, scored
from pyramiddrop.evaluation.studies.journal import Journal
from pyramiddrop.evaluation.studies.means import Means, ratio
from pyramiddrop.hf import anatomy
from pyramiddrop.hf.prefix import Prefix
from pyramiddrop.inference.answer import on_model
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prompt import build_batch
from pyramiddrop.inference.usage import batch_usage, known
from pyramiddrop.trace import Trace

Record = dict[str, Any]


@dataclass(frozen=True)
class Redundancy:
    """The study of one model.

    Attributes:
        name, source: of the model in the study, and where it came from.
        match: what an answer scores against the right ones.
        batch: samples of one forward.
        max_new_tokens: the longest answer; 1 compares next tokens alone.
        share: whether the layers before a drop run once for all shares where they can. The numbers are the same.
    """

    name: str
    source: str
    checkpoint: Checkpoint
    samples: Sequence[Sample]
    grid: Grid
    match: Match
    batch: int = 16
    max_new_tokens: int = 32
    share: bool = True

    @property
    def steps(self) -> int:
        """How often a batch is answered, in all."""
        return -(-len(self.samples) // self.batch) * (1 + len(self.grid.cells))

    def run(self, journal: Journal, advance: Callable[[int], None] = lambda steps: None) -> Record:
        """Measure what `journal` does not hold yet, and sum all up; `advance` is told how many steps are done."""
        pieces = []
        for start in range(0, len(self.samples), self.batch):
            key = f"{self.name}/{start}"
            if key in journal.entries:
                advance(1 + len(self.grid.cells))
            else:
                journal.add(key, self._measure(self.samples[start : start + self.batch], advance))
            pieces.append(journal.entries[key])
        return self._summed(pieces)

    @cached_property
    def shared(self) -> bool:
        """Whether prefills start from a recorded one: tried on the first sample, it must give the same to the bit."""
        model, layer, keep = self.checkpoint.model, self.grid.layers[-1], self.grid.keep[-1]
        if not self.share or not Prefix.can_share(anatomy(model)):
            return False
        inputs, prefix = self._inputs(self.samples[:1]), Prefix(anatomy(model), [layer])
        with prefix.recorded():
            self._hear(inputs)
        whole, _ = self._hear_cell(inputs, layer, keep, None)
        short, _ = self._hear_cell(inputs, layer, keep, prefix)
        return torch.equal(whole.logits, short.logits) and whole.texts == short.texts

    # ---- measuring -------------------------------------------------------------------------------------------------

    def _measure(self, samples: Sequence[Sample], advance: Callable[[int], None]) -> Record:
        """What a batch scores in every cell, a value a sample."""
        model, inputs = self.checkpoint.model, self._inputs(samples)
        prefix = Prefix(anatomy(model), self.grid.layers) if self.shared else None
        with prefix.recorded() if prefix else nullcontext():
            full = self._hear(inputs)
        advance(1)
        cells: list[Record] = []
        looks: dict[int, list[Tensor] | None] = {}
        for layer, keep in self.grid.cells:
            heard, trace = self._hear_cell(inputs, layer, keep, prefix)
            accuracy = scored(self.match, samples, heard.texts)
            used = batch_usage(model, inputs, single_drop(layer, keep), trace)
            cells.append({"accuracy": accuracy, **heard.against(full), "flops": [known(one.flops) for one in used]})
            looks[layer] = trace.stages[0].scores or looks.get(layer)
            advance(1)
        return {
            "shared": self.shared,
            "accuracy": scored(self.match, samples, full.texts),
            "visual_tokens": trace.visual_tokens,
            "flops": [known(one.flops) for one in batch_usage(model, inputs)],
            "cells": cells,
            "attention": [
                {"layer": layer, "picture": [*map(on_picture, scores)], "crowd": [*map(crowd, scores)]}
                for layer, scores in looks.items()
                if scores is not None
            ],
        }

    def _inputs(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        questions = [(list(one.images), one.question) for one in samples]
        return on_model(self.checkpoint.model, build_batch(self.checkpoint.processor, questions))

    def _hear(self, inputs: Mapping[str, Any]) -> Heard:
        return hear(self.checkpoint, inputs, self.max_new_tokens)

    def _hear_cell(
        self, inputs: Mapping[str, Any], layer: int, keep: float, prefix: Prefix | None
    ) -> tuple[Heard, Trace]:
        """What the model says with one drop, and the trace of its prefill."""
        replay = prefix.replayed(layer) if prefix else nullcontext()
        with single_drop(layer, keep)(self.checkpoint.model) as trace, replay:
            return self._hear(inputs), trace

    # ---- summing up ------------------------------------------------------------------------------------------------

    def _summed(self, pieces: Sequence[Record]) -> Record:
        means, accuracy, flops = Means(self.samples), _joined(pieces, "accuracy"), _joined(pieces, "flops")
        return {
            "name": self.name,
            "source": self.source,
            "num_layers": self.checkpoint.num_layers,
            "samples": len(self.samples),
            "visual_tokens": float(np.mean(_joined(pieces, "visual_tokens"))),
            "shared_prefix": all(piece["shared"] for piece in pieces),
            "vanilla": {"accuracy": means.score(accuracy), "by_kind": means.by_kind(accuracy)},
            "cells": [
                {"layer": layer, "keep": keep, **_cell(means, [piece["cells"][place] for piece in pieces], flops)}
                for place, (layer, keep) in enumerate(self.grid.cells)
            ],
            "attention": [
                {
                    "layer": looks[0]["layer"],
                    **{name: means.score(_joined(looks, name)) for name in ("picture", "crowd")},
                }
                for looks in zip(*(piece["attention"] for piece in pieces), strict=True)
            ],
        }


def _cell(means: Means, pieces: Sequence[Record], vanilla_flops: Sequence[float | None]) -> Record:
    values = {metric: _joined(pieces, metric) for metric in ("accuracy", *LABEL_FREE)}
    return {
        **{metric: means.score(numbers) for metric, numbers in values.items()},
        "by_kind": means.by_kind(values["accuracy"]),
        "flops_ratio": ratio(_joined(pieces, "flops"), vanilla_flops),
    }


def _attention(means: Means, pieces: Sequence[Sequence[Record]]) -> list[Record]:
    """By layer; nothing where the prompts of some piece had too few visual tokens for any ranking."""
    layers = zip(*pieces, strict=True) if all(pieces) else ()
    return [
        {"layer": looks[0]["layer"], **{name: means.score(_joined(looks, name)) for name in ("picture", "crowd")}}
        for looks in layers
    ]


def _joined(pieces: Sequence[Record], name: str) -> list[Any]:
    return [value for piece in pieces for value in piece[name]]
