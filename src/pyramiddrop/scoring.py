"""Which tokens matter: one small class per scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Evidence:
    """What a scorer may look at when a stage ends. B samples, N rows still in the sequence, G groups of visual tokens.

    A group is what shares a quota: all visual tokens of a sample, or one image where each image has its own.

    Attributes:
        visual: (B, N) bool, the visual tokens that are still there.
        ordinal: (B, N) long, the number of each visual token among the ORIGINAL ones of its sample, from 0.
        groups: (B, N) long, the group of each visual token, ascending along the row.
        quota: (B, G) long, how many tokens of each group will stay.
        hidden: (B, N, D), the hidden states that the ranking layer receives.
        attention: computes (B, N) float32, the attention that each row receives from the query tokens in the ranking
            layer; a function, so that a scorer that needs none costs none.
    """

    visual: Tensor
    ordinal: Tensor
    groups: Tensor
    quota: Tensor
    hidden: Tensor
    attention: Callable[[], Tensor]


class Scorer(Protocol):
    """Gives each row a score; among the visual tokens of a group, the highest scores stay."""

    def __call__(self, evidence: Evidence) -> Tensor:
        """(B, N) float32; what rows other than visual ones get is ignored. Ties are broken by the lower column."""
        ...


@dataclass(frozen=True)
class AttentionScorer:
    """PyramidDrop's and FastV's score: the attention from the query tokens (arXiv 2410.17247, 2403.06764)."""

    def __call__(self, evidence: Evidence) -> Tensor:
        return evidence.attention()


@dataclass(frozen=True)
class RandomScorer:
    """A control: which tokens stay is drawn at random, one draw a token, so that the stages are nested.

    The draw depends on `seed` and on the token's ordinal alone, so that a sample's result does not depend on its
    batch. With `seed=None` each call draws anew.
    """

    seed: int | None = 0

    def __call__(self, evidence: Evidence) -> Tensor:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        return _hashed(evidence.ordinal + (seed + 1) * 0x9E3779B9)


@dataclass(frozen=True)
class UniformScorer:
    """A control: the tokens that stay are evenly spaced among those that are still there, in each group."""

    def __call__(self, evidence: Evidence) -> Tensor:
        quota = evidence.quota
        present = torch.zeros_like(quota).scatter_add(1, evidence.groups, evidence.visual.long())
        before = present.cumsum(1) - present
        rank = evidence.visual.long().cumsum(1) - 1 - before.gather(1, evidence.groups)
        tokens, kept = (counts.gather(1, evidence.groups).clamp(min=1) for counts in (present, quota))
        # Of n tokens, c stay: those at which floor(rank * c / n) steps up. That is exactly c, as even as integers go.
        return ((rank + 1) * kept // tokens > rank * kept // tokens).float()


def _hashed(numbers: Tensor) -> Tensor:
    """Float32 in [0, 1) for each long: the first steps of splitmix64. Unlike a generator's draws, each stands alone."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return (numbers >> 40 & (1 << 24) - 1).float() / (1 << 24)


def attention_received(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor,
    weights: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention that each key receives from the query tokens: softmax over ALL keys in fp32, mean over the heads.

    Args:
        queries: (B, H, Q, d), rotated.
        keys: (B, Hkv, K, d), rotated; H is a multiple of Hkv (grouped-query attention).
        visible: (B, 1 or H, Q, K), bool (True: may be seen) or additive float, as attention masks are.
        weights: (B, Q), how much each query token counts; they are normalised to sum to 1 for each sample.
        scale: of the dot products.
        softcap: where the model caps its logits: cap * tanh(logits / cap).
        sinks: (H,), where the model's softmax counts one more logit a head, which belongs to no key.

    Returns:
        (B, K) float32. No S x S matrix is built: memory is B * H * Q * K.
    """
    batch, heads, count, width = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, width).float()
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, count, -1) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    hidden = visible.float() if visible.is_floating_point() else torch.where(visible, 0.0, float("-inf"))
    logits = logits + hidden
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(batch, -1, count, 1)], -1)
    # A padded query may see nothing: its row is NaN, and weighs nothing.
    received = logits.softmax(-1).mean(1).nan_to_num()[..., : keys.shape[2]]
    weights = weights.float()
    return torch.einsum("bqk,bq->bk", received, weights) / weights.sum(1, keepdim=True).clamp(min=1)
