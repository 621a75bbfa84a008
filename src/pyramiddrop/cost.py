"""What a prefill costs: FLOPs and KV-cache bytes of a decoder whose layers see sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the hidden states.
        intermediate: width of the gated MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        bytes_per_value: of a value in the KV cache (2 for bf16 and fp16).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes_per_value: int = 2


@dataclass(frozen=True)
class Cost:
    """FLOPs of the decoder's layers over one prefill, and bytes of the KV cache after it, against no dropping.

    A multiply-add counts as 2 FLOPs. Text and visual rows, the ranking and (of a batch) padding are counted; the vision
    tower, the embeddings and the language-model head are not, for dropping does not touch them.
    """

    flops: int
    vanilla_flops: int
    kv_bytes: int
    vanilla_kv_bytes: int

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.vanilla_flops if self.vanilla_flops else 1.0

    @property
    def kv_ratio(self) -> float:
        return self.kv_bytes / self.vanilla_kv_bytes if self.vanilla_kv_bytes else 1.0


def layer_flops(shape: DecoderShape, rows: int) -> int:
    """One decoder layer over `rows` rows: projections, attention over all pairs, gated MLP."""
    query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * rows * shape.hidden * (2 * query_width + 2 * key_width)
    attention = 4 * rows * rows * query_width
    mlp = 6 * rows * shape.hidden * shape.intermediate
    return projections + attention + mlp


def ranking_flops(shape: DecoderShape, rows: int, queries: int = 1) -> int:
    """Ranking `rows` rows by attention: their keys, the queries, and the products of both."""
    keys = 2 * rows * shape.hidden * shape.kv_heads * shape.head_dim
    asking = 2 * queries * shape.hidden * shape.heads * shape.head_dim
    return keys + asking + 2 * queries * rows * shape.heads * shape.head_dim


def prefill_flops(shape: DecoderShape, lengths: Sequence[int], ranked: Sequence[int] = ()) -> int:
    """A prefill of one sample: `lengths` rows in each layer, `ranked` rows at each ranking."""
    return sum(layer_flops(shape, rows) for rows in lengths) + sum(ranking_flops(shape, rows) for rows in ranked)


def kv_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Bytes of one sample's keys and values with `lengths` rows in each layer."""
    return 2 * shape.kv_heads * shape.head_dim * shape.bytes_per_value * sum(lengths)
