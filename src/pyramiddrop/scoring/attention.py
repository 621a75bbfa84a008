"""Scores by attention from the query tokens to each visual token, and published corrections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pyramiddrop.cost import DecoderShape, DropCounts, ranking_flops
from pyramiddrop.scoring.scorer import LARGEST, Scorer, ScorerInputs

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 2.0**-126  # the smallest positive normal float32


class _Attending(Scorer):
    """Base class of scorers that read the ranking layer's attention."""

    needs_attention: ClassVar[bool] = True

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return ranking_flops(shape, drop.rows, drop.queries)


@dataclass(frozen=True)
class AttentionScorer(_Attending):
    """The attention from the query tokens, mean over heads: the score of PyramidDrop and FastV."""

    source: ClassVar[str] = "arXiv 2410.17247, 2403.06764"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        return inputs.attention().mean(1)


@dataclass(frozen=True)
class InstructionScorer(_Attending):
    """The attention from all instruction tokens (not only the last one), mean over tokens and heads."""

    source: ClassVar[str] = "after SparseVLM, arXiv 2410.04417"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        return inputs.attention(instruction=True).mean(1)

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return ranking_flops(shape, drop.rows, drop.instruction)


@dataclass(frozen=True)
class RopeFreeScorer(_Attending):
    """The attention without rotary position embeddings, which favour tokens near the query: the end of the picture."""

    source: ClassVar[str] = "FEATHER, arXiv 2412.13180"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        return inputs.attention(rotated=False).mean(1)


@dataclass(frozen=True)
class DebiasedScorer(_Attending):
    """The attention divided by its trend over the picture; attention sinks get a score of 0.

    The trend is exponential in the token index: a least-squares line through the logarithms of a group's attention.
    Groups of fewer than four tokens are ranked by plain attention. A sink is a token with a massive activation: a
    hidden value of at least `sink` times the root mean square of all of them. (The paper uses the attention of padding
    instead, whose place only the processor knows.)
    """

    sink: float = 20.0
    source: ClassVar[str] = "arXiv 2508.17807; sinks: 2503.03321"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        logarithm = inputs.attention().mean(1).clamp(min=_SMALLEST).log()
        scores = logarithm - _line(inputs, inputs.token_index.float(), logarithm)
        hidden = inputs.hidden.float()
        peak = hidden.abs().amax(-1) / hidden.pow(2).mean(-1).sqrt()
        return scores.masked_fill(peak >= self.sink, -LARGEST)


@dataclass(frozen=True)
class TopHeadsScorer(_Attending):
    """The attention of the heads that attend to the visual tokens most, chosen for each layer and sample.

    Attributes:
        share: the share of the heads, at least one.
    """

    share: float = 0.25
    source: ClassVar[str] = "after arXiv 2412.18108"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {self.share!r}")

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        heads = inputs.attention()
        looking = heads.masked_fill(~inputs.visual[:, None], 0).sum(-1)
        top = looking.topk(max(1, int(heads.shape[1] * self.share)), dim=1).indices
        return heads.gather(1, top[..., None].expand(-1, -1, heads.shape[2])).mean(1)


def _line(inputs: ScorerInputs, x: Tensor, y: Tensor) -> Tensor:
    """(B, N) the least-squares line through the points (x, y) of each group, at x; the mean of fewer than four points.

    A line through two points leaves no residual, and one through three points leaves residuals whose order depends on
    x alone, so that rounding would decide.
    """
    count = inputs.per_group(inputs.visual.float()).clamp(min=1)
    mean_x, mean_y = (inputs.per_token(inputs.per_group(values) / count) for values in (x, y))
    offset = x - mean_x
    variance = inputs.per_group(offset * offset)
    slope = inputs.per_group(offset * (y - mean_y)) / variance.masked_fill(count <= 3, float("inf"))
    return mean_y + inputs.per_token(slope) * offset


def attention_by_head(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    weights: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention that each key receives in each head from the query tokens: softmax over ALL keys in fp32.

    Args:
        queries: (B, H, Q, d), rotated.
        keys: (B, Hkv, K, d), rotated; H is a multiple of Hkv (grouped-query attention).
        visible: (B, 1 or H, Q, K), an attention mask, bool (True: attended to) or additive float; None if every query
            token attends to every key.
        weights: (B, Q), the weight of each query token, normalised to sum to 1 for each sample; None for one query
            token a sample, Q = 1.
        scale: factor of the dot products.
        softcap: cap of the logits, cap * tanh(logits / cap), if the model has one.
        sinks: (H,), an extra logit of each head that belongs to no key, if the model has them.

    Returns:
        (B, H, K) float32. No S x S matrix is built: memory is B * H * Q * K.
    """
    batch, heads, count, width = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, width).float()
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, count, -1) * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if visible is not None:
        additive = visible.is_floating_point()
        logits = logits + visible.float() if additive else logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        import torch

        logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(batch, -1, count, 1)], -1)
    received = logits.softmax(-1)[..., : keys.shape[2]]
    if weights is None:
        return received[:, :, 0]
    # A padded query may attend to nothing: its row is NaN, with weight 0.
    received = received.nan_to_num()
    weights = weights.float() / weights.float().sum(1, keepdim=True).clamp(min=1)
    return (weights[:, None, None] @ received)[:, :, 0]


def attention_received(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    weights: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(B, K) float32: `attention_by_head`, with the same arguments, averaged over the heads."""
    return attention_by_head(queries, keys, visible, weights, scale, softcap, sinks).mean(1)
