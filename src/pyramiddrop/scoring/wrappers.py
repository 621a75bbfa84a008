"""Random and uniform scorers (controls), and scorers that wrap another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pyramiddrop.cost import DecoderShape, DropCounts
from pyramiddrop.scoring.scorer import LARGEST, Scorer, ScorerInputs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Around(Scorer):
    """Base class of scorers that wrap another one, `inner`."""

    inner: Scorer

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return self.inner.needs_attention

    @property
    def needs_previous_hidden(self) -> bool:  # type: ignore[override]
        return self.inner.needs_previous_hidden

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return self.inner.flops(shape, drop)


@dataclass(frozen=True)
class GridReserveScorer(_Around):
    """Space the share `share` of the kept tokens evenly over the picture; select the rest by the inner scorer."""

    share: float
    source: ClassVar[str] = "FEATHER's uniform sampling, arXiv 2412.13180"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        grid = UniformScorer()(replace(inputs, num_keep=(inputs.num_keep * self.share).long()))
        return self.inner(inputs).masked_fill(grid.bool(), LARGEST)


@dataclass(frozen=True)
class RandomAfterScorer(_Around):
    """Select tokens at random at drops before the 0-based `layer` and deeper ones, where scores say little."""

    layer: int
    source: ClassVar[str] = "arXiv 2512.07580"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        return RandomScorer()(inputs) if inputs.layer >= self.layer else self.inner(inputs)

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return 0 if drop.layer >= self.layer else self.inner.flops(shape, drop)


@dataclass(frozen=True)
class ComposedScorer(Scorer):
    """One scorer for the drop before the decoder, and another for the drops inside it.

    What it costs depends on the drop: see `Compose.ranking_flops`.
    """

    before: Scorer
    inside: Scorer

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return self.inside.needs_attention

    @property
    def needs_previous_hidden(self) -> bool:  # type: ignore[override]
        return self.inside.needs_previous_hidden

    @property
    def needs_vision_attention(self) -> bool:  # type: ignore[override]
        return self.before.needs_vision_attention

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        return self.inside(inputs) if inputs.layer else self.before(inputs)


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Random scores: one draw a token, so that later drops keep a subset of earlier ones.

    The draw depends only on `seed` and the token's index, so that a sample's result does not depend on its batch. With
    `seed=None`, each call draws anew.
    """

    seed: int | None = 0

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        seed = self.seed
        if seed is None:
            import torch

            seed = int(torch.randint(2**31, ()))
        # The first steps of splitmix64 hash each number to a float32 in [0, 1), independently of all others.
        numbers = inputs.token_index + (seed + 1) * 0x9E3779B9
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
        return (numbers >> 40 & (1 << 24) - 1).float() / (1 << 24)


@dataclass(frozen=True)
class UniformScorer(Scorer):
    """Keep tokens that are evenly spaced among the remaining ones of each group."""

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        present = inputs.per_group(inputs.visual.long())
        before = present.cumsum(1) - present
        rank = inputs.visual.long().cumsum(1) - 1 - inputs.per_token(before)
        tokens, kept = inputs.per_token(present).clamp(min=1), inputs.per_token(inputs.num_keep)
        # Of n tokens, keep those at which floor(rank * c / n) steps up: exactly c, as even as integers allow.
        return ((rank + 1) * kept // tokens > rank * kept // tokens).float()
