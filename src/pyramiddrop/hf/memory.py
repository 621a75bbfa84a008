"""What a KV cache must remember of a pruned prefill: for each stage, the original column of every slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pyramiddrop.hf.cache_layer import RowMemory, memory_of

_BLOCK = 128  # columns that are tabled ahead of decoding, so that not every step builds the tables anew


@dataclass(frozen=True)
class Slots:
    """The slots of one stage's KV cache that pruned prefills have written.

    Later slots need no entry: slot `columns.shape[1] + j` holds column `length + j`.

    Attributes:
        columns: (B, n) long, the column of the full sequence that stands in each slot.
        valid: (B, n) bool, False where a slot holds filler, or None where none does.
        length: how many columns of the full sequence these slots cover.
    """

    columns: Tensor
    valid: Tensor | None
    length: int

    @property
    def alive(self) -> Tensor:
        """(B, n) bool, which slots are no filler."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.valid is None else self.valid

    def select(self, pick: Callable[[Tensor], Tensor]) -> Slots:
        """The slots of the rows that `pick` takes of a (B, n) tensor."""
        return Slots(pick(self.columns), None if self.valid is None else pick(self.valid), self.length)

    def until(self, length: int) -> Slots:
        """The same slots, and those that the columns up to `length` took since; or fewer, where the cache was cropped.

        Raises:
            ValueError: where the cache was cropped so far that a dropped token's place is gone.
        """
        if length <= self.length:
            return self if length == self.length else self._cropped(self.length - length)
        batch = len(self.columns)
        later = torch.arange(self.length, length, device=self.columns.device).expand(batch, -1)
        valid = None
        if self.valid is not None:
            valid = torch.cat([self.valid, self.valid.new_ones(batch, later.shape[1])], 1)
        return Slots(torch.cat([self.columns, later], 1), valid, length)

    def _cropped(self, count: int) -> Slots:
        """Without the last `count` columns, which only text may hold: a crop takes that many slots from every layer."""
        columns, valid = self.columns[:, :-count], self.valid
        tail = torch.arange(self.length - count, self.length, device=columns.device)
        if count >= self.columns.shape[1] or not bool((self.columns[:, -count:] == tail).all()):
            raise ValueError(
                f"the KV cache was cropped by {count} tokens, into visual tokens of which some were dropped; crop only "
                "what follows the last image"
            )
        return Slots(columns, None if valid is None else valid[:, :-count], self.length - count)

    def first(self, length: int) -> Slots:
        """Of slots that were grown ahead, those up to column `length`."""
        count = self.columns.shape[1] - (self.length - length)
        return Slots(self.columns[:, :count], None if self.valid is None else self.valid[:, :count], length)

    def widened(self, width: int) -> Slots:
        """These slots for all `width` of a static cache: one shape for prompts of any length, so that compiled decoding
        does not recompile. Which of the later slots are filled already, the model's own mask tells."""
        grown = self.until(width)
        missing = width - grown.columns.shape[1]
        columns, valid = (torch.nn.functional.pad(table, (0, missing)) for table in (grown.columns, grown.alive))
        return Slots(columns, valid, width)

    def handed_out(self, cache: Any, index: int, added: int) -> Slots:
        """Those of these slots, the last `added` of this call, that layer `index` of a cache hands out: with a sliding
        window it holds no more slots than that, be they neighbours or far apart."""
        layer = _cache_layer(cache, index)
        before = self.columns.shape[1] - added
        if layer is None or not layer.is_sliding or before < layer.sliding_window:
            return self
        first = before - (layer.sliding_window - 1)
        return Slots(self.columns[:, first:], None if self.valid is None else self.valid[:, first:], self.length)

    def among(self, columns: Tensor, valid: Tensor | None) -> Slots:
        """The same slots, of which only those are no filler that hold one of the `columns` (B, n) that are `valid`."""
        shown = torch.zeros(len(columns), self.length + 1, dtype=torch.bool, device=columns.device)
        alive = torch.ones_like(columns, dtype=torch.bool) if valid is None else valid
        shown = shown.scatter(1, columns.masked_fill(~alive, self.length), True)
        shown[:, -1] = False
        return Slots(self.columns, self.alive & shown.gather(1, self.columns), self.length)

    def extended(self, rows: Tensor, valid: Tensor | None, past: int, length: int) -> Slots:
        """These slots after a further pruned prefill of `length` columns from column `past` on, which kept `rows`."""
        before, added = self.until(past), Slots(rows + past, valid, past + length)
        filled = before.valid is None and added.valid is None
        both = None if filled else torch.cat([before.alive, added.alive], 1)
        return Slots(torch.cat([before.columns, added.columns], 1), both, added.length)


#: What Transformers calls the KV cache: "cache" from 5.24 on.
CACHE_NAMES = ("cache", "past_key_values")


def cache_of(kwargs: Any) -> Any:
    """The KV cache among the arguments of a model or a layer, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def cache_made(output: Any) -> Any:
    """The KV cache in the output of a model that was given none, or None."""
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, Cache)), None)
    return cache_of(output)


def past_length(cache: Any) -> int:
    """Columns that a cache holds; 0 without one.

    Raises:
        ValueError: for a cache that is no list of layers, as those of continuous batching.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "layers"):
        raise ValueError(
            f"a {type(cache).__name__} is not supported with a pyramiddrop method, for it is no list of one layer for "
            "each decoder layer; use a DynamicCache or a StaticCache, or take the method off"
        )
    return int(cache.get_seq_length())


def static_width(cache: Any, index: int) -> int | None:
    """Slots of layer `index` where the cache is a static one, else None."""
    layer = _cache_layer(cache, index)
    return getattr(layer, "max_cache_len", None) if layer is not None and layer.is_compileable else None


def _cache_layer(cache: Any, index: int) -> Any:
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


@dataclass
class CacheMemory(RowMemory):
    """Lives in the cache, so that it is copied, passed on and forgotten with it, and follows its rows.

    Attributes:
        layers: before which tokens were dropped.
        positions: "original" or "compact".
        slots: stage number -> its slots, for stages at which something was dropped.
        wide: the same for a static cache's whole width, where it is one.
        shift: stage number -> (B, 1) how far positions were renumbered (`positions="compact"` only).
    """

    layers: tuple[int, ...]
    positions: str
    slots: dict[int, Slots] = field(default_factory=dict)
    wide: dict[int, Slots] = field(default_factory=dict)
    shift: dict[int, Tensor] = field(default_factory=dict)
    _ahead: dict[int, Slots] = field(default_factory=dict)

    @staticmethod
    def of(cache: Any) -> CacheMemory | None:
        """The memory of a cache, or None where nothing was ever dropped from it.

        Raises:
            ValueError: where its tokens were dropped before the decoder.
        """
        memory = memory_of(cache)
        if memory is None or isinstance(memory, CacheMemory):
            return memory
        raise ValueError(
            "this KV cache was pruned before the decoder, and cannot be continued by a method that drops inside it; go "
            "on with the method that filled it, or start without this cache"
        )

    def select(self, pick: Callable[[Tensor], Tensor]) -> CacheMemory:
        """The memory of the rows that `pick` takes of a (B, ...) tensor."""

        def rows(tables: Mapping[int, Slots]) -> dict[int, Slots]:
            return {stage: slots.select(pick) for stage, slots in tables.items()}

        shift = {stage: pick(shift) for stage, shift in self.shift.items()}
        return replace(self, slots=rows(self.slots), wide=rows(self.wide), shift=shift, _ahead=rows(self._ahead))

    def check(self, layers: tuple[int, ...], positions: str, batch: int) -> None:
        """Raise ValueError where a call cannot go on with this cache: another method, or another batch."""
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

    def hold(self, stage: int, slots: Slots, width: int | None) -> None:
        """Remember what a pruned prefill left in the cache of a stage; `width` is a static cache's."""
        self.slots[stage] = slots
        self._ahead.pop(stage, None)
        if width is not None:
            self.wide[stage] = slots.widened(width)

    def covering(self, stage: int, length: int) -> Slots | None:
        """The slots of a stage's cache up to column `length`, or None where nothing was dropped there."""
        slots, ahead = self.slots.get(stage), self._ahead.get(stage)
        if slots is None:
            return None
        if ahead is None or ahead.length < length:
            ahead = self._ahead[stage] = slots.until(length + _BLOCK)
        return ahead.first(length)

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on, where the cache was cropped."""
        if any(slots.length > length for slots in self.slots.values()):
            self.slots = {stage: slots.until(min(length, slots.length)) for stage, slots in self.slots.items()}
            self._ahead.clear()

    def missing(self, stage: int) -> int:
        """How many columns the cache of a stage holds no slot for."""
        slots = self.slots.get(stage)
        return 0 if slots is None else slots.length - slots.columns.shape[1]


def check_lengths(cache: Any, columns: int, layers: Mapping[int, int], memory: CacheMemory | None) -> None:
    """Raise ValueError where a layer of a dynamic cache does not hold what dropping has left of so many `columns`.

    Args:
        cache: of the call.
        columns: of the full sequence, up to the last one that the cache holds.
        layers: layer -> its stage, of the layers to look at.
        memory: of the cache.
    """
    if cache.is_compileable:
        return
    for index, stage in layers.items():
        layer = _cache_layer(cache, index)
        if not hasattr(layer, "get_seq_length"):
            continue
        held, expected = layer.get_seq_length(), columns - (memory.missing(stage) if memory else 0)
        if held != expected:
            raise ValueError(
                f"layer {index} of this KV cache holds {held} tokens, where {expected} are remembered: something else "
                "has removed keys from it, such as a press of kvpress, or it was rebuilt from a pruned cache's keys. "
                "Use one library at a time; copy a cache with copy.deepcopy, and crop it with its own crop"
            )
