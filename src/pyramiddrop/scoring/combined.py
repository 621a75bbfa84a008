"""Scorers that wrap another scorer: tokens reserved on a grid, and random selection in deep layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyramiddrop.cost import Choice, DecoderShape
from pyramiddrop.scoring.controls import RandomScorer, UniformScorer
from pyramiddrop.scoring.evidence import Scorer, ScorerInputs


@dataclass(frozen=True)
class _Around(Scorer):
    """A scorer around another, `inner`."""

    inner: Scorer

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return self.inner.needs_attention

    @property
    def needs_previous_hidden(self) -> bool:  # type: ignore[override]
        return self.inner.needs_previous_hidden

    def flops(self, shape: DecoderShape, choice: Choice) -> int:
        return self.inner.flops(shape, choice)


@dataclass(frozen=True)
class GridReserveScorer(_Around):
    """The share `share` of what stays is evenly spaced over the picture; the rest are the best of the others."""

    share: float
    source: ClassVar[str] = "FEATHER's uniform sampling, arXiv 2412.13180"

    def __call__(self, evidence: ScorerInputs) -> Tensor:
        grid = UniformScorer()(replace(evidence, quota=(evidence.quota * self.share).long()))
        # Below infinity, for that is what tokens have that must stay whatever their score.
        return self.inner(evidence).masked_fill(grid.bool(), torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class RandomAfterScorer(_Around):
    """Chance instead of the scorer at drops before the 0-based `layer` and later ones, where tokens say little."""

    layer: int
    source: ClassVar[str] = "arXiv 2512.07580"

    def __call__(self, evidence: ScorerInputs) -> Tensor:
        return RandomScorer()(evidence) if evidence.layer >= self.layer else self.inner(evidence)

    def flops(self, shape: DecoderShape, choice: Choice) -> int:
        return 0 if choice.layer >= self.layer else self.inner.flops(shape, choice)
