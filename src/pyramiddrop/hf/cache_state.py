"""The state of a pruned KV cache, stored on the cache object: the original column of each slot, for each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache as memoized
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.rows import map_tensors
from pyramiddrop.hf.versions import empty_object

_STATE = "pyramiddrop_state"


@memoized
def _carrying_class(base: type) -> Any:
    """Subclass the class of a cache layer so that the layer carries a state.

    Transformers reads from it the number of columns so far, and so columns that were dropped before it count too.
    """

    class CarryingLayer(base):  # type: ignore[misc]
        _layer_type = None  # Transformers registers subclasses that have one
        _cropping = False

        def get_seq_length(self) -> Any:
            return super().get_seq_length() + (0 if self._cropping else getattr(self, _STATE).first_dropped)

        def crop(self, *args: Any, **kwargs: Any) -> None:
            self._cropping = True  # this crops slots, not columns
            try:
                super().crop(*args, **kwargs)
            finally:
                del self._cropping

        def update(self, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                _check_called(getattr(self, _STATE))
            return super().update(*args, **kwargs)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._follow(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

        def batch_select_indices(self, indices: Any) -> None:
            super().batch_select_indices(indices)
            self._follow(lambda rows: rows[indices.to(rows.device) if isinstance(indices, Tensor) else indices])

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._follow(lambda rows: rows.repeat_interleave(repeats, 0))

        def _follow(self, pick: Callable[[Tensor], Tensor]) -> None:
            setattr(self, _STATE, getattr(self, _STATE).select(pick))

        def reset(self) -> None:
            super().reset()
            _detach(self)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return empty_object, (_carrying_class, base), self.__dict__

    CarryingLayer.__name__ = base.__name__
    return CarryingLayer


def _check_called(cache_state: CacheState) -> None:
    """Raise ValueError if the keys come from a model without a method; compiled models are not detected."""
    if not cache_state.called:
        raise ValueError(
            "this KV cache holds a prompt of which a pyramiddrop method dropped tokens, but the model that is called "
            "with it has no method on it. Call it inside the `with` block (or after `apply`), on the model or view "
            "that has the method, or start again without this cache"
        )
    cache_state.called = False


def _detach(layer: Any) -> None:
    if hasattr(layer, _STATE):
        delattr(layer, _STATE)
        layer.__class__ = type(layer).__base__


def _first(cache: Any) -> Any:
    """The first layer of a cache that counts tokens; None if there is none."""
    return next((layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")), None)


def attach_state(cache: Any, cache_state: CacheState) -> None:
    """Attach a state to a filled cache."""
    layer = _first(cache)
    if not hasattr(layer, _STATE):
        base: type = type(layer)
        layer.__class__ = _carrying_class(base)
    setattr(layer, _STATE, cache_state)


def detach_state(cache: Any) -> None:
    """Remove the state of a cache, if it has one."""
    _detach(_first(cache))


_BLOCK = 128  # columns to index in advance, so that not every decode step builds new tables


@dataclass(frozen=True)
class CacheIndex:
    """The slots of one stage's KV cache that pruned prefills have written.

    Later slots need no entry: slot `columns.shape[1] + j` holds column `length + j`.

    Attributes:
        columns: (B, n) long, the column of the full sequence in each slot.
        valid: (B, n) bool, False at slots that hold padding; None if there are none.
        length: number of columns of the full sequence that these slots cover.
    """

    columns: Tensor
    valid: Tensor | None
    length: int

    @property
    def alive(self) -> Tensor:
        """(B, n) bool, False at padding."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.valid is None else self.valid

    def select(self, pick: Callable[[Tensor], Tensor], length: int | None = None) -> CacheIndex:
        """Apply `pick`, a selection of samples or of the slots up to column `length`, to the (B, n) tensors."""
        valid = None if self.valid is None else pick(self.valid)
        return CacheIndex(pick(self.columns), valid, self.length if length is None else length)

    def resized(self, length: int) -> CacheIndex:
        """Extend the slots to the columns up to `length`, or shorten them if the cache was cropped."""
        if length == self.length:
            return self
        if length < self.length:  # a crop removes as many slots from every layer, and so all of them must be text
            count = self.length - length
            tail = torch.arange(length, self.length, device=self.columns.device)
            if count >= self.columns.shape[1] or not bool((self.columns[:, -count:] == tail).all()):
                raise ValueError(
                    f"the KV cache was cropped by {count} tokens, into visual tokens of which some were dropped; crop "
                    "only what follows the last image"
                )
            return self.first(length)
        later = torch.arange(self.length, length, device=self.columns.device).expand(len(self.columns), -1)
        valid = None
        if self.valid is not None:
            valid = torch.cat([self.valid, self.valid.new_ones(later.shape)], 1)
        return CacheIndex(torch.cat([self.columns, later], 1), valid, length)

    def first(self, length: int) -> CacheIndex:
        """The slots up to column `length`, if each later column has a slot."""
        count = self.columns.shape[1] - (self.length - length)
        return self.select(lambda table: table[:, :count], length)

    def window(self, cache: Any, index: int, added: int) -> CacheIndex:
        """The slots that layer `index` of a cache returns, of which the last `added` are this call's.

        A layer with a sliding window returns the last slots within its window, however far apart their columns are.
        """
        layer = _cache_layer(cache, index)
        before = self.columns.shape[1] - added
        if layer is None or not layer.is_sliding or before < layer.sliding_window:
            return self
        first = before - (layer.sliding_window - 1)
        return self.select(lambda table: table[:, first:])

    def restricted(self, columns: Tensor, valid: Tensor | None) -> CacheIndex:
        """Mark all slots as padding except those that hold one of the `valid` `columns` (B, n)."""
        shown = torch.zeros(len(columns), self.length + 1, dtype=torch.bool, device=columns.device)
        marked = columns if valid is None else columns.masked_fill(~valid, self.length)
        shown = shown.scatter(1, marked, True)
        shown[:, -1] = False
        return CacheIndex(self.columns, self.alive & shown.gather(1, self.columns), self.length)

    def extended(self, rows: Tensor, valid: Tensor | None, past: int, length: int) -> CacheIndex:
        """Append the kept `rows` of a further pruned prefill of `length` columns that begins at column `past`."""
        if not past:
            return CacheIndex(rows, valid, length)
        before, added = self.resized(past), CacheIndex(rows + past, valid, past + length)
        filled = before.valid is None and added.valid is None
        both = None if filled else torch.cat([before.alive, added.alive], 1)
        return CacheIndex(torch.cat([before.columns, added.columns], 1), both, added.length)


def past_length(cache: Any) -> int:
    """The number of columns in a cache; 0 without a cache."""
    if cache is None:
        return 0
    if not hasattr(cache, "layers"):  # that of continuous batching
        raise ValueError(
            f"a {type(cache).__name__} is not supported with a pyramiddrop method, for it is no list of one layer for "
            "each decoder layer; use a DynamicCache or a StaticCache, or take the method off"
        )
    return int(cache.get_seq_length())


def static_width(cache: Any, index: int) -> int | None:
    """The width of layer `index` if the cache is static, else None."""
    layer = _cache_layer(cache, index)
    return getattr(layer, "max_cache_len", None) if layer is not None and layer.is_compileable else None


def _cache_layer(cache: Any, index: int) -> Any:
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


@dataclass
class CacheState:
    """The state of one cache. It is stored in the cache, so that it is copied, reordered and freed with it.

    Attributes:
        layers: the layers before which tokens were dropped.
        slots: stage -> its slots, for stages with dropped tokens.
        full_width: the same for the whole width of a static cache.
        shift: stage -> (B, 1), by how much positions were renumbered (`positions="compact"` only).
        plain: True if the last decode step changed no layer's arguments and had no mask.
        called: True if a patched model has opened a forward with this cache that has not added keys yet.
    """

    layers: tuple[int, ...]
    positions: str
    slots: dict[int, CacheIndex] = field(default_factory=dict)
    full_width: dict[int, CacheIndex] = field(default_factory=dict)
    shift: dict[int, Tensor] = field(default_factory=dict)
    plain: bool = False
    called: bool = False
    _ahead: dict[int, CacheIndex] = field(default_factory=dict)

    @staticmethod
    def of(cache: Any) -> CacheState | None:
        """The state of a cache; None if nothing was ever dropped from it."""
        cache_state: CacheState | None = getattr(_first(cache), _STATE, None)
        return cache_state

    def select(self, pick: Callable[[Tensor], Tensor]) -> CacheState:
        """Apply `pick`, a selection of samples, to the (B, ...) tensors."""
        return map_tensors(self, pick)

    def check(self, layers: tuple[int, ...], positions: str, batch: int) -> None:
        """Raise ValueError if a call cannot continue this cache: another method, or another batch size."""
        if (layers, positions) != (self.layers, self.positions):
            raise ValueError(
                f"this KV cache was pruned before layers {list(self.layers)} with positions={self.positions!r}, and "
                f"cannot be continued by a method that drops before layers {list(layers)} with positions={positions!r}"
            )
        held = {len(slots.columns) for slots in self.slots.values()}
        if held != {batch}:
            raise ValueError(
                f"this KV cache was pruned for a batch of {held.pop()}; this call has a batch of {batch}. Give the "
                "batch that the cache holds; rows are picked and repeated by the cache's own methods "
                "(batch_select_indices, batch_repeat_interleave, reorder_cache)"
            )

    def hold(self, stage: int, slots: CacheIndex, width: int | None) -> None:
        """Store the slots that a pruned prefill left in a stage's cache; `width` is that of a static cache."""
        self.slots[stage], self.plain = slots, False
        self._ahead.pop(stage, None)
        if width is not None:
            # All slots, so that prompts of any length have one shape and compiled decoding does not recompile. The
            # model's own mask tells which of the later ones are filled.
            grown = slots.resized(width)
            missing = width - grown.columns.shape[1]
            columns, valid = (torch.nn.functional.pad(table, (0, missing)) for table in (grown.columns, grown.alive))
            self.full_width[stage] = CacheIndex(columns, valid, width)

    def grown_to(self, stage: int, length: int) -> CacheIndex | None:
        """The slots of a stage's cache up to column `length`; None if nothing was dropped there."""
        slots, ahead = self.slots.get(stage), self._ahead.get(stage)
        if slots is None:
            return None
        if ahead is None or ahead.length < length:
            ahead = self._ahead[stage] = slots.resized(length + _BLOCK)
        return ahead.first(length)

    def crop(self, length: int) -> None:
        """Discard the columns from `length` on, after the cache was cropped."""
        if any(slots.length > length for slots in self.slots.values()):
            self.slots = {stage: slots.resized(min(length, slots.length)) for stage, slots in self.slots.items()}
            self._ahead.clear()

    @property
    def first_dropped(self) -> int:
        """The number of columns without a slot in the cache of layer 0: those dropped before the decoder."""
        return self.num_dropped(1) if self.layers[0] == 0 else 0

    def num_dropped(self, stage: int) -> int:
        """The number of columns without a slot in the cache of a stage."""
        slots = self.slots.get(stage)
        return 0 if slots is None else slots.length - slots.columns.shape[1]


def check_lengths(cache: Any, columns: int, layers: Mapping[int, int], cache_state: CacheState | None) -> None:
    """Raise ValueError if a layer of a dynamic cache does not hold as many rows as dropping has left.

    Args:
        columns: number of columns of the full sequence, up to the last one in the cache.
        layers: layer -> its stage, for the layers to check.
    """
    if cache.is_compileable:
        return
    for index, stage in layers.items():
        layer = _cache_layer(cache, index)
        if not hasattr(layer, "get_seq_length"):
            continue
        # The layer that carries the state also counts the columns that were dropped before it.
        carried: CacheState | None = getattr(layer, _STATE, None)
        held = layer.get_seq_length() - (carried.first_dropped if carried else 0)
        expected = columns - (cache_state.num_dropped(stage) if cache_state else 0)
        if held != expected:
            raise ValueError(
                f"layer {index} of this KV cache holds {held} tokens, where {expected} are remembered: something else "
                "has removed keys from it, such as a press of kvpress, or it was rebuilt from a pruned cache's keys. "
                "Use one library at a time; copy a cache with copy.deepcopy, and crop it with its own crop"
            )
