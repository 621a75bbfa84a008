"""Attention masks of pruned layers, always gathered from the mask that the text model made for the full sequence.

Never rebuilt from positions: Transformers would read the gaps between them as packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyramiddrop.hf.memory import Slots
from pyramiddrop.hf.rows import take_rows


def follow_mask(
    mask: Tensor | None, rows: Tensor | None, slots: Slots, past: int, length: int, attention: str, width: int | None
) -> Tensor | None:
    """The mask of a pruned layer.

    Args:
        mask: of the full sequence: (B, 1, length, W) bool or additive, (B, W) for flash kernels, or None where the
            kernel needs none.
        rows: (B, N) the rows of this call that the layer computes, or None for all of them.
        slots: what stands in the layer's KV cache once it has added this call's rows.
        past: columns before this call.
        length: columns of this call.
        attention: name of the attention implementation.
        width: slots of a static cache, or None for a growing one.
    """
    if mask is None:
        if slots.valid is None:
            return None  # stays None, so that the kernel keeps its own causal path
        slots = slots.until(past + length)
        if attention.startswith("flash"):
            return slots.valid
        mask = causal(_query_columns(rows, slots, past, length), slots.columns, slots.valid)
        return _padded(_filler_sees_itself(mask, rows, slots.valid), width)
    written, slots = slots, slots.until(mask.shape[-1])
    if mask.dim() == 2:
        return hide(mask.gather(1, slots.columns), slots.valid)
    if rows is not None:
        mask = take_rows(mask.transpose(1, 2), rows).transpose(1, 2)
    mask = take_columns(mask, slots.columns)
    if slots.valid is not None:
        mask = hide(mask, slots.valid[:, None, None])
    return _padded(_filler_sees_itself(mask, rows, written.valid), width)


def take_columns(mask: Tensor, columns: Tensor) -> Tensor:
    """Gather `columns` (B, K) of a mask (B or 1, heads, Q, W) along its last dimension."""
    columns = columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return mask.expand(len(columns), -1, -1, -1).gather(3, columns)


def causal(query_columns: Tensor, columns: Tensor, valid: Tensor | None) -> Tensor:
    """(B, 1, Q, K) bool: a query sees the valid ones of the key `columns` (B, K) up to its own column."""
    visible = columns[:, None] <= query_columns[..., None]
    return (visible if valid is None else visible & valid[:, None])[:, None]


def hide(mask: Tensor, visible: Tensor | None) -> Tensor:
    """Hide from a bool, integer or additive mask what is not `visible`."""
    return mask if visible is None else mask.masked_fill(~visible, _hidden(mask))


def _filler_sees_itself(mask: Tensor, rows: Tensor | None, valid: Tensor | None) -> Tensor:
    """Show each filler row its own slot, the last of those `valid` (B, n): a row that sees nothing can become NaN,
    and a masked NaN is still NaN for everybody."""
    if rows is not None and valid is not None:
        filler = ~valid[:, None, -rows.shape[1] :]
        own = mask.diagonal(offset=valid.shape[1] - rows.shape[1], dim1=-2, dim2=-1)
        own.masked_fill_(filler, 0 if mask.is_floating_point() else True)
    return mask


def _hidden(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0


def _query_columns(rows: Tensor | None, slots: Slots, past: int, length: int) -> Tensor:
    if rows is not None:
        return rows + past
    return torch.arange(past, past + length, device=slots.columns.device).expand(len(slots.columns), -1)


def _padded(mask: Tensor, width: int | None) -> Tensor:
    """Widen the mask to the slots of a static cache; those beyond the sequence are hidden."""
    if width is None or width == mask.shape[-1]:
        return mask
    return torch.nn.functional.pad(mask, (0, width - mask.shape[-1]), value=_hidden(mask))
