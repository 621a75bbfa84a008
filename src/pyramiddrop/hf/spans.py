"""How far each decoder layer sees: everything before, a window, a chunk, or through a recurrent state alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """What one layer's tokens see of the tokens before them, by ORIGINAL column, whatever was dropped between.

    Attributes:
        kind: "full"; "sliding": the last `size` columns; "chunked": the columns of the same chunk of `size`, counted
            from the first token that is no padding; "recurrent": a state that runs along the sequence (linear
            attention, convolutions), so that nothing can be ranked there.
        size: of the window or chunk, in columns; 0 for the other kinds.
    """

    kind: str
    size: int = 0

    @property
    def windowed(self) -> bool:
        return self.kind in ("sliding", "chunked")

    def reaches(self, queries: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        """Which columns are near enough.

        Args:
            queries: (B, Q) long, columns.
            keys: (B, K) long, columns.
            start: (B,) long, the first column of each sample that is no padding.

        Returns:
            (B, 1, Q, K) bool; the order of columns (causality) is not looked at.
        """
        queries, keys = queries[:, None, :, None], keys[:, None, None, :]
        if self.kind == "sliding":
            return keys > queries - self.size
        if self.kind == "chunked":
            start = start[:, None, None, None]
            return (keys - start) // self.size == (queries - start) // self.size
        return torch.ones_like(keys <= queries)


FULL = Span("full")
_SIZES = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
_KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "conv": "recurrent",
}


class UnknownLayerTypeError(ValueError):
    """A decoder has a kind of layer of which nothing is known; the message names it."""


def spans_of(text: Any) -> tuple[Span, ...]:
    """The span of each decoder layer of a text model, by its configuration.

    Raises:
        UnknownLayerTypeError: for a layer type that is not known.
    """
    config, count = text.config, len(text.layers)
    types = getattr(config, "layer_types", None)
    if types is None:
        # Without layer types, a model that makes sliding masks at all (Mistral) makes them for every layer.
        slides = hasattr(sys.modules[type(text).__module__], "create_sliding_window_causal_mask")
        size = getattr(config, "sliding_window", None) if slides else None
        return (Span("sliding", size) if size else FULL,) * count
    unknown = sorted(set(types) - set(_KINDS))
    if unknown:
        raise UnknownLayerTypeError(f"layers of type {', '.join(map(repr, unknown))}")
    return tuple(_span(_KINDS[layer_type], config) for layer_type in types)


def _span(kind: str, config: Any) -> Span:
    size = getattr(config, _SIZES[kind], None) if kind in _SIZES else None
    return Span(kind, size or 0) if size or kind == "recurrent" else FULL
