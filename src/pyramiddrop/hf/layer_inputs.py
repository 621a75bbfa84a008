"""Inputs of the layers after a drop: masks, positions and per-token arguments of the remaining rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.cache_state import CacheIndex, static_width
from pyramiddrop.hf.masks import MaskSpec, follow_mask, follow_recurrent_mask
from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.hf.plan import GeneralPlan, Plan, Rules
from pyramiddrop.hf.rows import Selection, take_embeddings, take_rows
from pyramiddrop.hf.versions import cache_of

Kwargs = dict[str, Any]

_POSITIONS = ("position_ids", "position_embeddings")


@dataclass(frozen=True)
class LayerCall:
    """The call of a decoder layer.

    Attributes:
        hidden: (B, N, D) hidden states, or (streams, B, N, D) in models with several streams.
        kwargs: the text model's arguments for the full length.
    """

    index: int
    layer: nn.Module
    hidden: Tensor
    kwargs: Kwargs


@dataclass(eq=False)
class LayerInputs:
    """Builds the arguments of pruned layers in one forward, each once for all layers that share it.

    Attributes:
        past: number of columns before this call.
        length: number of columns of this call.
        shift: stage -> (B, 1), by how much earlier calls renumbered positions on the stage's cache.
        padding: (B, past + length) the call's own 2-D attention mask, or None.
        plan: the plan of a call that drops, or None.
    """

    info: ModelInfo
    rules: Rules
    past: int
    length: int
    shift: Mapping[int, Tensor]
    padding: Tensor | None
    plan: Plan | None = None
    _made: dict[tuple[Any, ...], list[tuple[Any, Any]]] = field(default_factory=dict)

    @property
    def compact(self) -> bool:
        """True if the remaining tokens are renumbered."""
        return self.rules.positions == "compact"

    def build(
        self,
        stage: int,
        index: int,
        kept: Selection | None,
        slots: CacheIndex,
        added: int,
        hidden: Tensor,
        kwargs: Kwargs,
    ) -> Kwargs:
        """Build the arguments of layer `index`, in `stage`, that differ from the text model's.

        Args:
            kept: the remaining rows of this call; None: all.
            slots: the slots of the KV cache that the layer reads, including this call's rows.
            added: number of this call's rows among them.
            hidden: (B, N, D), the layer's input.
            kwargs: the text model's arguments for the full length.
        """
        mask, scope, source = kwargs.get("attention_mask"), self.info.scopes[index], self.info.sources[index]
        if scope.kind == "recurrent":
            own = self._once(("mask", stage, scope), mask, lambda: follow_recurrent_mask(mask, kept))
        else:
            cache, count = cache_of(kwargs), hidden.shape[-2]
            width = static_width(cache, source)
            if scope.windowed:
                slots = slots.window(cache, source, added)
            own = self._once(
                ("mask", stage, scope, width, slots.columns.shape[1], count, source == index),
                mask,
                lambda: follow_mask(mask, kept, slots, count, self._mask_spec(index, width)),
            )
        if kept is not None or self.compact:
            bounds = {} if kept is None else self._bounds(stage, kwargs)
            return {"attention_mask": own} | self.tokens(stage, kept, hidden, kwargs) | bounds
        return {} if own is mask else {"attention_mask": own}  # {}: a step that does not depend on the missing slots

    def _mask_spec(self, index: int, width: int | None) -> MaskSpec:
        scope, attention = self.info.scopes[index], self.info.attention
        return MaskSpec(scope, attention, self.past, self.length, width, self.counts_columns(index), self.padding)

    def counts_columns(self, index: int) -> bool:
        """True if the model's own mask for layer `index` counts columns instead of the slots of a pruned cache."""
        # Layer 0 reports all columns, also those that were dropped before it: see `CarryingLayer`.
        return not self.past or self.info.first_of_kind[self.info.scopes[index]] < max(self.rules.schedule.layers[0], 1)

    def tokens(self, stage: int, kept: Selection | None, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """The per-token arguments in `kwargs` for the rows in `kept`; renumbered on the cache of `stage` if compact."""
        # Ranking shares its rows with the layers before the drop, and so their positions unless these are renumbered.
        rows = (stage if self.compact else None, kept)
        source = kwargs.get("position_embeddings")
        if isinstance(source, tuple | list):
            source = source[0]  # the same object for layers that share them
        make = partial(self._positions, stage, kept, hidden, kwargs)
        positions: Kwargs = self._once(("positions", *rows), source, make)
        names = per_token(kwargs, self.length)
        if kept is None:
            return positions | {name: kwargs[name] for name in names}
        return positions | {
            name: self._once((name, *rows), kwargs[name], partial(take_rows, kwargs[name], kept.rows)) for name in names
        }

    def _positions(self, stage: int, kept: Selection | None, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """`position_ids` and `position_embeddings`, if the layer takes them."""
        ids = kwargs.get("position_ids")
        if self.compact and (kept is not None or stage in self.shift):
            assert ids is not None
            renumbered = ids - self.shift[stage].to(ids.device) if kept is None else self.renumbered(stage, kept, ids)
            return {"position_ids": renumbered, "position_embeddings": self.info.rotary(hidden, renumbered)}
        positions = {name: kwargs[name] for name in _POSITIONS if name in kwargs}
        # Flash attention would read gaps between the ids as packed sequences; the embeddings hold all it needs.
        if kept is not None and self.info.attention.startswith("flash"):
            positions["position_ids"] = None
        return positions if kept is None else take_tokens(positions, kept.rows)

    def _bounds(self, stage: int, kwargs: Kwargs) -> Kwargs:
        """The bounds of packed documents among the remaining rows, for kernels that read them.

        Kernels read them from `cu_seq_lens_q`, and flash kernels from position ids too.
        """
        plan = self.plan
        bounds = None if plan is None or plan.batch > 1 else plan.document_bounds(stage)
        told = kwargs.get("cu_seq_lens_q") is not None
        flash = self.info.attention.startswith("flash") and kwargs.get("position_ids") is not None
        if bounds is None or not (told or flash):
            return {}
        cumulative = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds.cumulative)
        return cumulative | dict.fromkeys(("max_length_q", "max_length_k"), bounds.longest)

    def renumbered(self, stage: int, kept: Selection, position_ids: Tensor) -> Tensor:
        """(B, N) consecutive positions in each document; a further turn continues those of the one before."""
        valid = torch.ones_like(kept.rows) if kept.valid is None else kept.valid.long()
        consecutive = (valid.cumsum(1) - 1).clamp(min=0)
        packing = self.plan.packing if isinstance(self.plan, GeneralPlan) else None
        if packing is not None:
            documents = packing.documents.gather(1, kept.rows)
            starts = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            return consecutive - torch.where(starts, consecutive, 0).cummax(1).values
        if not self.past:
            return consecutive
        start = kept.rows.gather(1, valid.argmax(1, keepdim=True))
        first = take_rows(position_ids, start, -1)
        return first - self.shift.get(stage, torch.zeros_like(first)) + consecutive

    def _once(self, key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
        """Build once for each `source`, compared by identity: a compiled graph would guard on `id` and recompile."""
        made = self._made.setdefault(key, [])
        for held, value in made:
            if held is source:
                return value
        made.append((source, make()))
        return made[-1][1]


def take_tokens(tokens: Kwargs, rows: Tensor) -> Kwargs:
    """Gather rows (B, n) of the result of `LayerInputs.tokens`."""
    take: dict[str, Any] = {"position_ids": partial(take_rows, dim=-1), "position_embeddings": take_embeddings}
    return {name: value if value is None else take.get(name, take_rows)(value, rows) for name, value in tokens.items()}


def per_token(kwargs: Kwargs, length: int) -> list[str]:
    """Names of further per-token tensors (B or 1, length, ...), such as token types; not masks and positions."""
    own = ("attention_mask", *_POSITIONS)
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name not in own}
    return [name for name, value in tensors.items() if value.dim() >= 2 and value.shape[1] == length]


_BETWEEN = ("deepstack_visual_embeds", "visual_pos_masks")  # a list: entry i is added after layer i
_BEFORE = ("deepstack_features", "vision_mask")  # a dict: entry i is added before layer i


@dataclass(eq=False)
class DeepStack:
    """Visual features that are added after tokens were dropped; the model's own loop adds those before.

    Attributes:
        features: layer -> (M, D), added to the layer's input.
        visual: (B, L) bool, the M rows of the full sequence to which they are added.
    """

    features: Mapping[int, Tensor]
    visual: Tensor

    @classmethod
    def taken(cls, kwargs: dict[str, Any], first: int) -> tuple[DeepStack | None, dict[str, Any]]:
        """Take over the features that the text model would add after layer `first`, the first layer with a drop.

        Returns:
            The features, or None if there are none; and the `kwargs` for the model's own loop.
        """
        name, mask = next((pair for pair in (_BETWEEN, _BEFORE) if kwargs.get(pair[0]) is not None), _BETWEEN)
        given = kwargs.get(name)
        if given is None:
            return None, kwargs
        if name == "deepstack_features":
            own = {layer: features for layer, features in given.items() if layer <= first}
            taken = {layer: features for layer, features in given.items() if layer > first}
        else:
            own = given[:first]
            taken = {index + 1: features for index, features in enumerate(given) if index >= first}
        if not taken:
            return None, kwargs
        visual = kwargs[mask]
        return cls(taken, visual.squeeze(-1) if visual.dim() == 3 else visual), {**kwargs, name: own}

    def add(self, index: int, hidden: Tensor, kept: Selection | None) -> Tensor:
        """Add the features of layer `index` to its input `hidden` (B, N, D), the rows in `kept`."""
        features = self.features.get(index)
        if features is None:
            return hidden
        visual = self.visual.to(hidden.device)
        # Numbered through the batch, so that the features of dropped rows are left out without reading the device.
        number = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape)
        if kept is not None:
            number, visual = take_rows(number, kept.rows), take_rows(visual, kept.rows)
        rows = features.to(hidden)[number.flatten()].view(*number.shape, -1)
        return torch.where(visual[..., None], hidden + rows, hidden)
