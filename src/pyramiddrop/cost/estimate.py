"""The cost of one prompt under one schedule: every measure of the cost model, by every convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyramiddrop.cost.flops import (
    DropCounts,
    RankingCost,
    attention_ranking_flops,
    head_flops,
    prefill_flops,
    projector_flops,
    step_flops,
    vision_flops,
)
from pyramiddrop.cost.shapes import BYTES, DecoderShape, ModelShape, Prompt
from pyramiddrop.schedule import Schedule

CONVENTIONS = ("full", "paper", "fastv")


@dataclass(frozen=True)
class Cost:
    """FLOPs of the decoder's layers over one prefill and bytes of the KV cache after it, with and without dropping.

    A multiply-add counts as 2 FLOPs. Text and visual rows, ranking and the padding of a batch are counted. The vision
    tower, the embeddings and the language-model head are not, because dropping does not change them.
    """

    flops: int
    vanilla_flops: int
    kv_bytes: int
    vanilla_kv_bytes: int

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the prefill as a share of vanilla's."""
        return self.flops / self.vanilla_flops if self.vanilla_flops else 1.0

    @property
    def kv_ratio(self) -> float:
        """Bytes of KV cache as a share of vanilla's."""
        return self.kv_bytes / self.vanilla_kv_bytes if self.vanilla_kv_bytes else 1.0


@dataclass(frozen=True)
class Parts:
    """True FLOPs of the parts of a model in one prefill; 2 for a multiply-add.

    Attributes:
        decoder: the decoder's layers.
        ranking: the ranking at the drops.
        head: the language-model head over the last row.
        vision: the vision tower; 0 if its sizes are unknown.
        projector: the projector between the tower and the decoder.
    """

    decoder: int
    ranking: int
    head: int
    vision: int
    projector: int

    @property
    def pruned(self) -> int:
        """The parts that dropping inside the decoder changes: its layers and the ranking."""
        return self.decoder + self.ranking

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.decoder + self.ranking + self.head + self.vision + self.projector


@dataclass(frozen=True)
class CostBreakdown:
    """The cost of one prompt under one schedule.

    Attributes:
        visual_by_layer: number of visual tokens in each layer.
        full: true FLOPs of the prefill.
        paper, fastv: FLOPs by the published conventions (multiply-adds, visual tokens alone).
        step_flops: true FLOPs of the first decode step, head included.
        kv_by_layer: bytes of each layer's KV cache after the prefill.
        activation_bytes: estimated peak of an inference prefill, in bytes.
    """

    visual_by_layer: tuple[int, ...]
    full: Parts
    paper: int
    fastv: int
    step_flops: int
    kv_by_layer: tuple[int, ...]
    activation_bytes: int

    @property
    def average_tokens(self) -> float:
        """Visual tokens in a layer, averaged over the layers."""
        return sum(self.visual_by_layer) / len(self.visual_by_layer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache of all layers."""
        return sum(self.kv_by_layer)

    def flops(self, convention: str) -> int:
        """FLOPs of the prefill by `convention`: "full", "paper" or "fastv"."""
        return {"full": self.full.total, "paper": self.paper, "fastv": self.fastv}[convention]

    def as_dict(self) -> dict[str, Any]:
        """All FLOPs and bytes as plain numbers."""
        return {
            "average_visual_tokens": self.average_tokens,
            "visual_tokens_by_layer": list(self.visual_by_layer),
            "flops": {name: self.flops(name) for name in CONVENTIONS},
            "full_parts": asdict(self.full),
            "decode_step_flops": self.step_flops,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_by_layer": list(self.kv_by_layer),
            "activation_bytes": self.activation_bytes,
        }


def estimate_cost(
    model: ModelShape,
    prompt: Prompt,
    schedule: Schedule | None = None,
    ranking_cost: RankingCost = attention_ranking_flops,
) -> CostBreakdown:
    """Estimate the cost of a prefill of `prompt`.

    Args:
        schedule: the drops; None for vanilla.
        ranking_cost: gives the FLOPs of the ranking at one drop, as `Method.ranking_flops` does.

    Raises:
        ValueError: if the schedule lies beyond the decoder's layers.
    """
    shape = model.decoder
    if schedule is not None:
        schedule.check_depth(shape.layers)
    visual = visual_by_layer(schedule, prompt.visual_tokens, shape.layers)
    rows = [tokens + prompt.text_tokens for tokens in visual]
    return CostBreakdown(
        visual_by_layer=tuple(visual),
        full=Parts(
            decoder=prefill_flops(shape, rows, visual=visual),
            ranking=sum(ranking_cost(shape, drop) for drop in drop_counts(schedule, prompt)),
            head=head_flops(shape),
            vision=vision_flops(model.vision, prompt) if model.vision else 0,
            projector=projector_flops(model.vision, prompt) if model.vision else 0,
        ),
        paper=sum(paper_layer_flops(shape, count, layer) for layer, count in enumerate(visual)),
        fastv=sum(fastv_layer_flops(shape, count, layer) for layer, count in enumerate(visual)),
        step_flops=step_flops(shape, rows),
        kv_by_layer=tuple(layer_kv_bytes(shape, count, layer) for layer, count in enumerate(rows)),
        activation_bytes=activation_bytes(shape, rows),
    )


def visual_by_layer(schedule: Schedule | None, tokens: int, layers: int) -> list[int]:
    """The number of visual tokens, of `tokens` at first, in each of `layers` layers."""
    if schedule is None:
        return [tokens] * layers
    counts = [tokens, *schedule.counts(tokens)]
    return [counts[schedule.stage_of(layer)] for layer in range(layers)]


def drop_counts(schedule: Schedule | None, prompt: Prompt) -> list[DropCounts]:
    """The drops of one sample that rank: those that drop some, but not all, of the visual tokens."""
    found, before = [], prompt.visual_tokens
    for stage in schedule.stages if schedule else ():
        kept = stage.count(prompt.visual_tokens)
        if 0 < kept < before:
            rows = before + prompt.text_tokens
            found.append(DropCounts(stage.layer, rows, before, kept, instruction=prompt.num_queries))
        before = kept
    return found


def paper_layer_flops(shape: DecoderShape, visual: int, layer: int = 0) -> int:
    """FLOPs of a layer with n = `visual` tokens by PyramidDrop's formula, 4nd² + 2n²d + 3ndm."""
    return _published(shape, visual, layer, matrices=3)


def fastv_layer_flops(shape: DecoderShape, visual: int, layer: int = 0) -> int:
    """FLOPs of a layer with n = `visual` tokens by FastV's formula, 4nd² + 2n²d + 2ndm."""
    return _published(shape, visual, layer, matrices=2)


def _published(shape: DecoderShape, visual: int, layer: int, matrices: int) -> int:
    hidden = shape.hidden
    return visual * hidden * (4 * hidden + 2 * visual + matrices * shape.mlp_width(layer, visual=True))


def layer_kv_bytes(shape: DecoderShape, rows: int, layer: int = 0) -> int:
    """Bytes in the cache of the 0-based `layer` after `rows` rows.

    A recurrent layer caches its state alone, and a layer with a window the last rows alone.
    """
    mixer = shape.mixer(layer)
    values = mixer.cached * mixer.held(rows) + mixer.state
    return shape.bytes_per_value * values + BYTES["float32"] * mixer.float_state


def kv_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Bytes of one sample's KV cache with `lengths` rows in the layers."""
    return sum(layer_kv_bytes(shape, rows, layer) for layer, rows in enumerate(lengths))


def activation_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Estimated peak bytes of hidden states in an inference prefill, without weights and cache.

    Each row holds its residual and its normed state, and either queries, keys and values before and after rotation with
    the attention output, or the MLP's gate, up and product. Attention without an S x S matrix is assumed. The first
    stage computes on every token, so dropping does not lower this peak; it lowers what training stores for the backward
    pass.
    """
    widest = max(rows * _row_width(shape, layer) for layer, rows in enumerate(lengths))
    return widest * shape.bytes_per_value


def _row_width(shape: DecoderShape, layer: int) -> int:
    mixer = shape.mixer(layer)
    mixing = mixer.inputs // shape.hidden + mixer.query_width + mixer.key_width + mixer.value_width
    return 2 * shape.hidden + max(mixing, shape.matrices * shape.mlp_width(layer))
