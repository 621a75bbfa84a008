"""The state of one forward of a patched model, and the decode step on a pruned KV cache, which drops nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.cost import RankingCost
from pyramiddrop.hf.cache_state import CacheIndex, CacheState
from pyramiddrop.hf.layer_inputs import Kwargs, LayerInputs
from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import AttentionScorer, Scorer
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class Rules:
    """The settings of a method that the adapter needs; `pyramiddrop.methods` documents them."""

    schedule: Schedule
    scorer: Scorer
    positions: str
    rank_layer: str
    grouping: str
    logits: str
    merge: bool
    ranking_flops: RankingCost

    @property
    def are_usual(self) -> bool:
        """True if a prefill whose last token is the query may use `LastTokenPlan`."""
        return type(self.scorer) is AttentionScorer and self.grouping == "sample" and not self.merge

    @property
    def ranking_layers(self) -> list[int]:
        """The layer that ranks for each drop; for a drop before the decoder, layer 0, whose input is read."""
        return [max(0, layer - (self.rank_layer == "last")) for layer in self.schedule.layers]


class Forward:
    """The state of one forward, carried from layer to layer in the call's kwargs.

    Attributes:
        trace: the trace to fill, or None.
        unreached: the number of a prefill, until the text model is called with it.
        shift_labels: the next labels of the remaining rows, if the loss is computed on these alone.
    """

    trace: Trace | None = None
    unreached: int | None = None
    shift_labels: Tensor | None = None

    def before_text(self, kwargs: Kwargs) -> Kwargs:
        """The arguments that replace `kwargs` in the call of the text model."""
        return kwargs

    def before_layer(
        self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor, Kwargs]:
        """The inputs of decoder layer `index`, in `stage`, that replace `hidden` (B, N, D) and `kwargs`."""
        return hidden, kwargs

    def after_text(self, output: Any) -> Any:
        """The result that replaces the text model's `output`."""
        return output


class StagedForward(Forward):
    """A forward whose layers differ in their rows or KV cache slots.

    Args:
        info: the parts of the model.
        rules: the rules of the method.
        inputs: builds the arguments of pruned layers.
        cache_state: the state of the KV cache; None if nothing was ever dropped from it.
    """

    def __init__(self, info: ModelInfo, rules: Rules, inputs: LayerInputs, cache_state: CacheState | None) -> None:
        self.info, self.rules, self.inputs, self.cache_state = info, rules, inputs, cache_state
        self.past, self.length = inputs.past, inputs.length
        self._slots: dict[tuple[int, int], CacheIndex | None] = {}
        self._changes: dict[tuple[int, ...], tuple[Kwargs, Kwargs]] = {}

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


class DecodeStep(StagedForward):
    """A call that drops nothing on a pruned KV cache: a decode step, or a further turn of text."""

    cache_state: CacheState

    def __init__(
        self,
        info: ModelInfo,
        rules: Rules,
        past: int,
        length: int,
        cache_state: CacheState,
        padding: Tensor | None = None,
    ) -> None:
        first = rules.schedule.layers[0]
        inputs = LayerInputs(info, rules.positions, past, length, cache_state.shift, first, padding)
        super().__init__(info, rules, inputs, cache_state)

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
