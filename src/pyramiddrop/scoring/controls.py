"""Controls: scores that know nothing of the picture or of the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyramiddrop.scoring.evidence import Scorer, ScorerInputs


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Which tokens stay is drawn at random, one draw a token, so that the stages are nested.

    The draw depends on `seed` and on the token's ordinal alone, so that a sample's result does not depend on its
    batch. With `seed=None` each call draws anew.
    """

    seed: int | None = 0

    def __call__(self, evidence: ScorerInputs) -> Tensor:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        return _hashed(evidence.ordinal + (seed + 1) * 0x9E3779B9)


@dataclass(frozen=True)
class UniformScorer(Scorer):
    """The tokens that stay are evenly spaced among those that are still there, in each group."""

    def __call__(self, evidence: ScorerInputs) -> Tensor:
        present = evidence.per_group(evidence.visual.long())
        before = present.cumsum(1) - present
        rank = evidence.visual.long().cumsum(1) - 1 - evidence.per_token(before)
        tokens, kept = evidence.per_token(present).clamp(min=1), evidence.per_token(evidence.quota)
        # Of n tokens, c stay: those at which floor(rank * c / n) steps up. That is exactly c, as even as integers go.
        return ((rank + 1) * kept // tokens > rank * kept // tokens).float()


def _hashed(numbers: Tensor) -> Tensor:
    """Float32 in [0, 1) for each long: the first steps of splitmix64. Unlike a generator's draws, each stands alone."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return (numbers >> 40 & (1 << 24) - 1).float() / (1 << 24)
