"""The queries and keys of a decoder layer, as the layer itself would compute them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyramiddrop.hf.rows import take_rows


@dataclass(frozen=True)
class Projection:
    """Rotated queries (B, H, Q, d) of the asking rows, rotated keys (B, Hkv, N, d) of all rows, and the scale."""

    queries: Tensor
    keys: Tensor
    scale: float


def project(layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], asking: Tensor) -> Projection:
    """Project `hidden` (B, N, D) by `layer`'s own modules: all rows to keys, the rows `asking` (B, Q) to queries.

    Modules are called, never their `.weight`, so that LoRA, quantised and sharded weights work; values are not
    computed.
    """
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(hidden)  # type: ignore[operator]
    queries = _heads(attention.q_proj(take_rows(normed, asking)), attention, "q_norm")
    keys = _heads(attention.k_proj(normed), attention, "k_norm")
    # The family's own rotation: layouts differ (halves or pairs, partial), the module that defines the layer knows.
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    cos, sin = (table.to(hidden.device) for table in position_embeddings)
    _, keys = rotate(keys, keys, cos, sin)
    queries, _ = rotate(queries, queries, take_rows(cos, asking), take_rows(sin, asking))
    return Projection(queries, keys, attention.scaling)


def _heads(projected: Tensor, attention: Any, norm: str) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d), through the per-head norm where the family has one."""
    split = projected.view(*projected.shape[:2], -1, attention.head_dim)
    if hasattr(attention, norm):
        split = getattr(attention, norm)(split)
    return split.transpose(1, 2)
