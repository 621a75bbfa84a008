"""Owns the bytes: of the KV cache, and an estimate of the activations at the widest moment of a prefill."""

from __future__ import annotations

from collections.abc import Sequence

from pyramiddrop.cost.shapes import DecoderShape


def layer_kv_bytes(shape: DecoderShape, rows: int) -> int:
    """Bytes of `rows` keys and values in one layer."""
    return 2 * shape.kv_heads * shape.head_dim * shape.bytes_per_value * rows


def kv_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Bytes of one sample's keys and values with `lengths` rows in each layer."""
    return layer_kv_bytes(shape, sum(lengths))


def activation_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Estimated bytes of hidden states at the widest moment of an inference prefill; weights and cache not included.

    Each row holds its residual, its normed state, and either queries, keys and values before and after rotation with
    attention's output, or the MLP's gate, up and product. Attention without an S x S matrix is assumed. The first
    stage sees every token, so dropping does not lower this peak; it lowers what training keeps for the backward pass.
    """
    query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 3 * query_width + 3 * key_width
    widest = max(
        rows * (2 * shape.hidden + max(attention, 3 * shape.mlp_width(layer))) for layer, rows in enumerate(lengths)
    )
    return widest * shape.bytes_per_value
