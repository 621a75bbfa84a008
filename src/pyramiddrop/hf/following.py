"""What the layers after a drop are called with: masks, positions and whatever is kept per token follow the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.families import Anatomy
from pyramiddrop.hf.masks import follow_mask
from pyramiddrop.hf.memory import Slots, static_width
from pyramiddrop.hf.rows import Kept, take_positions, take_rows

Kwargs = dict[str, Any]


class Following:
    """The followers of one forward. Each is worked out once a stage and serves all of its layers.

    Args:
        anatomy: of the model.
        positions: "original" or "compact".
        past: columns before this call.
        length: columns of this call.
        shift: stage -> (B, 1), how far earlier calls renumbered positions on the stage's cache.
    """

    def __init__(self, anatomy: Anatomy, positions: str, past: int, length: int, shift: Mapping[int, Tensor]) -> None:
        self.anatomy, self.compact = anatomy, positions == "compact"
        self.past, self.length, self.shift = past, length, shift
        self._followers: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}

    def kwargs(self, stage: int, index: int, kept: Kept | None, slots: Slots, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """What layer `index`, with `stage` drops behind it, is called with.

        Args:
            kept: the rows of this call that are left, or None for all.
            slots: what stands in the layer's KV cache once it has added them.
            hidden: (B, N, D), for device and dtype.
            kwargs: of the text model, for the full length.
        """
        mask, width = kwargs.get("attention_mask"), static_width(kwargs.get("past_key_values"), index)
        own = self._once(("mask", stage, width), mask, lambda: self._mask(mask, kept, slots, width))
        if own is mask and kept is None and not self.compact:
            return kwargs  # a step of decoding to which the missing slots make no difference
        followed = {**kwargs, "attention_mask": own}
        if kept is not None or self.compact:
            source = kwargs["position_embeddings"][0]
            followed |= self._once(("positions", stage), source, lambda: self.positions(stage, kept, hidden, kwargs))
        if kept is not None:
            for name in _per_token(kwargs, self.length):
                followed[name] = self._once((name, stage), kwargs[name], partial(take_rows, kwargs[name], kept.rows))
        return followed

    def _mask(self, mask: Tensor | None, kept: Kept | None, slots: Slots, width: int | None) -> Tensor | None:
        rows = kept.rows if kept else None
        return follow_mask(mask, rows, slots, self.past, self.length, self.anatomy.attention, width)

    def positions(self, stage: int, kept: Kept | None, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """`position_ids` and `position_embeddings` of the rows in `kept`; renumbered on the cache of `stage`."""
        ids, embeddings = kwargs["position_ids"], kwargs["position_embeddings"]
        if self.compact and (kept is not None or stage in self.shift):
            renumbered = ids - self.shift[stage].to(ids.device) if kept is None else self.renumbered(stage, kept, ids)
            return {"position_ids": renumbered, "position_embeddings": self.anatomy.rotary(hidden, renumbered)}
        if kept is None:
            return {"position_ids": ids, "position_embeddings": embeddings}
        gathered = tuple(take_positions(table, kept.rows) for table in embeddings)
        # Flash attention would take the gaps between the ids for packed sequences; the embeddings hold all it needs.
        flash = self.anatomy.attention.startswith("flash")
        return {"position_ids": None if flash else take_positions(ids, kept.rows), "position_embeddings": gathered}

    def renumbered(self, stage: int, kept: Kept, position_ids: Tensor) -> Tensor:
        """(B, N) consecutive positions; a further turn goes on where the one before ended."""
        valid = torch.ones_like(kept.rows) if kept.valid is None else kept.valid.long()
        consecutive = (valid.cumsum(1) - 1).clamp(min=0)
        if not self.past:
            return consecutive
        start = kept.rows.gather(1, valid.argmax(1, keepdim=True))
        first = take_positions(position_ids, start)
        return first - self.shift.get(stage, torch.zeros_like(first)) + consecutive

    def new_shift(self, stage: int, kept: Kept, position_ids: Tensor) -> Tensor:
        """(B, 1) by how much tokens after this call must be numbered lower on the cache of `stage`."""
        return take_positions(position_ids, kept.rows[:, -1:]) - self.renumbered(stage, kept, position_ids)[:, -1:]

    def _once(self, key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
        """The follower of `source`, found by identity: compiled graphs would guard on its `id` and recompile."""
        followers = self._followers.setdefault(key, [])
        for held, follower in followers:
            if held is source:
                return follower
        followers.append((source, make()))
        return followers[-1][1]


def _per_token(kwargs: Kwargs, length: int) -> list[str]:
    """Names of further tensors (B or 1, length, ...), e.g. token types; masks and positions have their own ways."""
    own = ("attention_mask", "position_ids", "position_embeddings")
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name not in own}
    return [name for name, value in tensors.items() if value.dim() >= 2 and value.shape[1] == length]
