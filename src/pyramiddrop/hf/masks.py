"""Attention masks of pruned layers, by the scope of each layer: full, windowed, chunked or recurrent.

The model's own mask is gathered. If the model made none, or measured it by a pruned cache, the mask follows the layer's
own rule over ORIGINAL columns. Positions are not used: Transformers would read gaps between them as packed sequences.
Which tokens are visual and which ask is found in `prompt_masks.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.cache_state import CacheIndex
from pyramiddrop.hf.rows import Selection, take_rows


@dataclass(frozen=True)
class MaskSpec:
    """What the mask of a layer depends on beside its rows.

    Attributes:
        past: number of columns before this call.
        length: number of columns of this call.
        width: number of slots of a static cache; None for a growing one.
        counts_columns: True if the model's own mask counts columns; False if it measures a pruned cache layer.
        padding: (B, past + length) the call's own 2-D attention mask, or None.
    """

    scope: AttentionScope
    attention: str
    past: int
    length: int
    width: int | None
    counts_columns: bool
    padding: Tensor | None

    @property
    def total(self) -> int:
        """The number of columns in the cache and in this call."""
        return self.past + self.length

    def fits_window(self) -> bool:
        """True if the whole sequence fits in the window, so no window mask is needed."""
        padded = self.scope.kind == "chunked" and self.padding is not None
        return not self.scope.windowed or (self.total <= self.scope.size and not padded)


def follow_mask(
    mask: Tensor | None, kept: Selection | None, slots: CacheIndex, count: int, spec: MaskSpec
) -> Tensor | None:
    """Build the mask of a pruned layer.

    Args:
        mask: the model's mask of the full sequence: (B, 1, length, W) bool or additive, (B, W) for flash kernels; None
            if the kernel needs none.
        kept: the rows of this call that the layer computes; None: the last `count` of all.
        slots: the slots that the layer's KV cache returns, including this call's rows.
        count: number of rows that the layer computes.
    """
    if mask is None or not spec.counts_columns:
        return _ruled(mask, kept, slots, count, spec)
    if spec.scope.windowed:
        offset = spec.total - mask.shape[-1]
    else:
        slots, offset = slots.resized(mask.shape[-1]), 0
    if mask.dim() == 2:
        return hide(mask.gather(1, slots.columns), slots.valid)
    if kept is not None:
        mask = take_rows(mask.transpose(1, 2), kept.rows).transpose(1, 2)
    mask = take_columns(mask, (slots.columns - offset).clamp(min=0) if offset else slots.columns)
    if offset:
        mask = hide(mask, (slots.columns >= offset)[:, None, None])
    if slots.valid is not None:
        mask = hide(mask, slots.valid[:, None, None])
    return _finished(mask, kept, slots, spec)


def follow_recurrent_mask(mask: Tensor | None, kept: Selection | None) -> Tensor | None:
    """The (B, N) mask of a recurrent layer, whose state padding must not change; None if there is no padding."""
    if kept is None:
        return mask
    given = None if mask is None else mask.gather(1, kept.rows)
    if kept.valid is None:
        return given
    return kept.valid.long() if given is None else hide(given, kept.valid)


def _ruled(mask: Tensor | None, kept: Selection | None, slots: CacheIndex, count: int, spec: MaskSpec) -> Tensor | None:
    """Build a mask by the layer's own rule, if the model made none or one that does not count columns."""
    slots = slots.resized(spec.total)
    valid = slots.valid
    if mask is not None and spec.padding is not None:  # the model makes no mask if it saw no padding
        shown = spec.padding.bool().gather(1, slots.columns)
        valid = shown if valid is None else valid & shown
    if spec.attention.startswith("flash"):
        return valid
    # Without a mask, SDPA uses its causal path, which is right for a square and for a single row. Eager needs a mask.
    if valid is None and spec.fits_window() and spec.attention != "eager" and (count == 1 or not spec.past):
        return None
    if kept is None:
        last = torch.arange(spec.total - count, spec.total, device=slots.columns.device)
        queries = last.expand(len(slots.columns), -1)
    else:
        queries = kept.rows + spec.past
    seen = causal(queries, slots.columns, valid)
    if not spec.fits_window():
        start = queries.new_zeros(len(queries)) if spec.padding is None else spec.padding.long().argmax(1)
        seen = seen & spec.scope.reaches(queries, slots.columns, start)
    if mask is not None and mask.is_floating_point():
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, _hidden(mask))
    return _finished(seen, kept, slots, spec)


def take_columns(mask: Tensor, columns: Tensor) -> Tensor:
    """Gather `columns` (B, K) of a mask (B or 1, heads, Q, W) along its last dimension."""
    columns = columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return mask.expand(len(columns), -1, -1, -1).gather(3, columns)


def causal(query_columns: Tensor, columns: Tensor, valid: Tensor | None) -> Tensor:
    """(B, 1, Q, K) bool: a query attends to the valid key `columns` (B, K) up to its own column."""
    visible = columns[:, None] <= query_columns[..., None]
    return (visible if valid is None else visible & valid[:, None])[:, None]


def hide(mask: Tensor, visible: Tensor | None) -> Tensor:
    """Mask everything that is not `visible` in a bool, integer or additive mask."""
    return mask if visible is None else mask.masked_fill(~visible, _hidden(mask))


def _finished(mask: Tensor, kept: Selection | None, slots: CacheIndex, spec: MaskSpec) -> Tensor:
    """Let padding rows attend to themselves, and widen the mask to a static cache, masked beyond the sequence."""
    if kept is not None and kept.valid is not None:  # a row without keys can become NaN, which spreads even if masked
        own = slots.columns[:, None] == (kept.rows + spec.past)[..., None]
        own = (own & ~kept.valid[..., None])[:, None]
        mask = mask.masked_fill(own, 0 if mask.is_floating_point() else True)
    if spec.width is None or spec.width == mask.shape[-1]:
        return mask
    return torch.nn.functional.pad(mask, (0, spec.width - mask.shape[-1]), value=_hidden(mask))


def _hidden(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0


@dataclass(frozen=True)
class AttentionScope:
    """Which earlier tokens a layer's tokens attend to, by ORIGINAL column, regardless of drops in between.

    Attributes:
        kind: "full"; "sliding": the last `size` columns; "chunked": the columns of the same chunk of `size`, counted
            from the first token that is not padding; "recurrent": a state along the sequence (linear attention,
            convolutions), so that nothing can be ranked there.
        size: the size of the window or chunk in columns; 0 for the other kinds.
    """

    kind: str
    size: int = 0

    @property
    def windowed(self) -> bool:
        """True if the layer attends to a window or a chunk only."""
        return self.kind in ("sliding", "chunked")

    def reaches(self, queries: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        """(B, 1, Q, K) bool: which keys lie within the scope of which queries, without regard to causality.

        Args:
            queries, keys: (B, Q) and (B, K) long, columns.
            start: (B,) long, the first column of each sample that is not padding.
        """
        queries, keys = queries[:, None, :, None], keys[:, None, None, :]
        if self.kind == "sliding":
            return keys > queries - self.size
        if self.kind == "chunked":
            start = start[:, None, None, None]
            return (keys - start) // self.size == (queries - start) // self.size
        return torch.ones_like(keys <= queries)


FULL = AttentionScope("full")
_SIZES = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
_KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "conv": "recurrent",
}


class UnknownLayerTypeError(ValueError):
    """A decoder has a layer of unknown type; the message names it."""


def scopes_of(text: Any) -> tuple[AttentionScope, ...]:
    """The attention scope of each decoder layer, by the text model's configuration."""
    config, count = text.config, len(text.layers)
    types = getattr(config, "layer_types", None)
    if types is None:
        # Without layer types, a model with sliding masks (Mistral) uses them in every layer.
        slides = hasattr(sys.modules[type(text).__module__], "create_sliding_window_causal_mask")
        size = getattr(config, "sliding_window", None) if slides else None
        return (AttentionScope("sliding", size) if size else FULL,) * count
    unknown = sorted(set(types) - set(_KINDS))
    if unknown:
        raise UnknownLayerTypeError(f"layers of type {', '.join(map(repr, unknown))}")
    sizes = {kind: getattr(config, name, None) for kind, name in _SIZES.items()}
    scopes = {kind: AttentionScope(kind, size) for kind, size in sizes.items() if size}
    scopes["recurrent"] = AttentionScope("recurrent")
    return tuple(scopes.get(_KINDS[layer_type], FULL) for layer_type in types)
