"""Bytes of the KV cache, and an estimate of the activations at the widest moment of a prefill."""

from __future__ import annotations

from collections.abc import Sequence

from pyramiddrop.cost.shapes import BYTES, DecoderShape


def layer_kv_bytes(shape: DecoderShape, rows: int, layer: int = 0) -> int:
    """Bytes that the cache of the 0-based `layer` holds after `rows` rows: of a layer with a window the last ones
    alone, of a recurrent layer its state."""
    mixer = shape.mixer(layer)
    values = mixer.cached * mixer.held(rows) + mixer.state
    return shape.bytes_per_value * values + BYTES["float32"] * mixer.float_state


def kv_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Bytes of one sample's cache with `lengths` rows in each layer."""
    return sum(layer_kv_bytes(shape, rows, layer) for layer, rows in enumerate(lengths))


def activation_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Estimated bytes of hidden states at the widest moment of an inference prefill; weights and cache not included.

    Each row holds its residual, its normed state, and either queries, keys and values before and after rotation with
    attention's output, or the MLP's gate, up and product. Attention without an S x S matrix is assumed. The first
    stage sees every token, so dropping does not lower this peak; it lowers what training keeps for the backward pass.
    """
    widest = max(rows * _row_width(shape, layer) for layer, rows in enumerate(lengths))
    return widest * shape.bytes_per_value


def _row_width(shape: DecoderShape, layer: int) -> int:
    mixer = shape.mixer(layer)
    mixing = mixer.inputs // shape.hidden + mixer.query_width + mixer.key_width + mixer.value_width
    return 2 * shape.hidden + max(mixing, shape.matrices * shape.mlp_width(layer))
