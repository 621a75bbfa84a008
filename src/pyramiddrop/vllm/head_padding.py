"""Pad the heads of an attention layer with zeros to a size that the attention backend computes."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from torch.nn.functional import pad


def pad_heads(attention: Any) -> None:
    """Let vLLM's `Attention` layer compute heads of a size that its backend lacks; any other layer is left as it is.

    vLLM's backend on a CPU has no heads of 48, say. Zeros behind a query and a key add nothing to their product, and
    those behind a value are cut off again. The KV cache is as wide as the padded heads.

    Raises:
        ValueError: for heads larger than any that the backend computes.
    """
    backend, size = attention.attn_backend, attention.head_size
    if backend.supports_head_size(size):
        return
    wider = [other for other in backend.get_supported_head_sizes() if other > size]
    if not wider:
        raise ValueError(f"heads of {size} cannot be served: {backend.get_name()} computes smaller ones only")
    wide = min(wider)
    attention.head_size = attention.head_size_v = attention.impl.head_size = wide
    original = attention.forward

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        padded = [pad(_by_head(states, size), (0, wide - size)).flatten(-2) for states in (query, key, value)]
        return _by_head(original(*padded, **options), wide)[..., :size].flatten(-2)

    attention.forward = types.MethodType(forward, attention)


def _by_head(states: Tensor, size: int) -> Tensor:
    return states.view(*states.shape[:-1], -1, size)
