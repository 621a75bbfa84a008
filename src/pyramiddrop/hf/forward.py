"""The state of one forward of a patched model, and the decode step on a pruned KV cache, which drops nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.cache_state import CacheIndex, CacheState
from pyramiddrop.hf.layer_inputs import Kwargs, LayerInputs
from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.trace import Trace


class Forward:
    """The state of one forward, carried from layer to layer in the call's kwargs; layers differ in rows or cache slots.

    Attributes:
        cache_state: the state of the KV cache; None if nothing was ever dropped from it.
        trace: the trace to fill, or None.
        unreached: the number of a prefill, until the text model is called with it.
        shift_labels: the next labels of the remaining rows, if the loss is computed on these alone.
    """

    trace: Trace | None = None
    unreached: int | None = None
    shift_labels: Tensor | None = None

    def __init__(self, inputs: LayerInputs, cache_state: CacheState | None) -> None:
        self.inputs, self.info, self.rules, self.cache_state = inputs, inputs.info, inputs.rules, cache_state
        self.past, self.length = inputs.past, inputs.length
        self._slots: dict[tuple[int, int], CacheIndex | None] = {}
        self._changes: dict[tuple[int, ...], tuple[Kwargs, Kwargs]] = {}

    def before_text(self, kwargs: Kwargs) -> Kwargs:
        """The arguments that replace `kwargs` in the call of the text model."""
        return kwargs

    def before_layer(
        self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor, Kwargs]:
        """The inputs of decoder layer `index`, in `stage`, that replace `hidden` (B, N, D) and `kwargs`."""
        raise NotImplementedError

    def after_text(self, output: Any) -> Any:
        """The result that replaces the text model's `output`."""
        raise NotImplementedError

    def _move(self, device: torch.device) -> None:
        """Move to the device of the text model's masks and positions; the call's tokens may be on another one."""
        padding = self.inputs.padding
        if padding is not None and padding.device != device:
            self.inputs.padding = padding.to(device)

    def _changed(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """`kwargs` for layer `index`, built once for all layers that share them, because building takes time."""
        key = stage, self.info.alike[index], hidden.shape[-2]
        given, changes = self._changes.get(key, ({}, {}))
        if len(given) != len(kwargs) or any(given.get(name) is not value for name, value in kwargs.items()):
            changes = self._build(stage, index, hidden, kwargs)
            self._changes[key] = kwargs, changes
        return {**kwargs, **changes} if changes else kwargs

    def _build(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """The arguments of layer `index` that differ from the text model's."""
        raise NotImplementedError

    def _slots_of(self, stage: int, source: int) -> CacheIndex | None:
        """The slots of the KV cache of layer `source`, which a layer of `stage` reads.

        None if the cache holds every column and none is hidden.
        """
        if (stage, source) in self._slots:
            return self._slots[stage, source]
        own, held = self._own_slots(stage), self.rules.schedule.stage_of(source)
        slots = own
        if own is not None and held != stage:
            total = self.past + self.length
            own, all_columns = own.resized(total), torch.arange(total, device=own.columns.device)
            slots = self._own_slots(held) or CacheIndex(all_columns.expand(len(own.columns), -1), None, total)
            slots = slots.resized(total).restricted(own.columns, own.valid)
        self._slots[stage, source] = slots
        return slots

    def _own_slots(self, stage: int) -> CacheIndex | None:
        """The slots of a stage's own KV cache, including this call's rows; None if it holds every column."""
        raise NotImplementedError


class DecodeStep(Forward):
    """A call that drops nothing on a pruned KV cache: a decode step, or a further turn of text."""

    cache_state: CacheState

    @staticmethod
    def is_plain(info: ModelInfo, length: int, cache_state: CacheState) -> bool:
        """True if a step of `length` columns changes no layer's arguments.

        This holds for a single row if nothing in the cache is hidden, which an earlier step has shown: the row attends
        to every slot of a layer's cache.
        """
        one_row = length == 1 and not info.windowed
        return one_row and cache_state.plain and (info.attention == "sdpa" or info.attention.startswith("flash"))

    def after_text(self, output: Any) -> Any:
        if self.length == 1 and not torch.compiler.is_compiling():
            built = self._changes.values()
            self.cache_state.plain = all(not own and given.get("attention_mask") is None for given, own in built)
        return output

    def before_layer(
        self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor, Kwargs]:
        if index == 0:
            self._move(hidden.device)
        return hidden, self._changed(stage, index, hidden, kwargs)

    def _build(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        slots = self._slots_of(stage, self.info.sources[index])
        return {} if slots is None else self.inputs.build(stage, index, None, slots, self.length, hidden, kwargs)

    def _own_slots(self, stage: int) -> CacheIndex | None:
        return self.cache_state.full_width.get(stage) or self.cache_state.grown_to(stage, self.past + self.length)
