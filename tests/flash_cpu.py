"""Transformers' own FlashAttention path on the CPU: its masks, packed rows and unpadding, around kernels in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """(B, L, H, d) of queries (B, L, H, d) and keys and values (B, K, Hkv, d), causal to the lower right."""
    assert causal
    assert window_size == (-1, -1)
    groups = q.shape[2] // k.shape[2]
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    rows, columns = queries.shape[2], keys.shape[2]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    logits = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1) @ values).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """(total, H, d), each sequence by itself."""
    for bounds, longest, total in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
        assert bounds.dtype == torch.int32
        assert int(bounds[0]) == 0
        assert int(bounds[-1]) == total
        assert int(bounds.diff().max()) <= int(longest)
    parts = [
        flash_attn_func(
            q[None, first:last], k[None, start:stop], v[None, start:stop], softmax_scale=softmax_scale, causal=causal
        )[0]
        for (first, last), (start, stop) in zip(
            pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
        )
    ]
    return torch.cat(parts)


@contextmanager
def flash_on_cpu(text: PreTrainedModel) -> Iterator[None]:
    """Let a text model run "flash_attention_2" as Transformers calls it."""
    library = modeling_flash_attention_utils

    def kernels(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return flash_attn_func, flash_attn_varlen_func, None, library._pad_input, library._unpad_input

    before = text.config._attn_implementation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_lazy_imports", kernels)
        patch.setattr(library, "_loaded_implementation", None)
        text.config._attn_implementation_internal = "flash_attention_2"
        try:
            yield
        finally:
            text.config._attn_implementation_internal = before
