"""One forward of a patched text model: decides at stage ends, and makes every later layer follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.families import Anatomy
from pyramiddrop.hf.masks import causal, follow_mask, hide, take_columns
from pyramiddrop.hf.memory import CacheMemory, Slots
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.projections import project
from pyramiddrop.hf.rows import scatter_rows, take_positions, take_rows
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import Evidence, Scorer, attention_received
from pyramiddrop.selection import compact, select
from pyramiddrop.trace import Trace

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """The settings of a method, as the adapter needs them; the front door documents them."""

    schedule: Schedule
    scorer: Scorer
    positions: str
    rank_layer: str
    per_image: bool
    logits: str


@dataclass
class Kept:
    """The rows that a stage left. Written once, so that gradient checkpointing replays the same decision.

    Attributes:
        rows: (B, N) long, columns of this call.
        local: (B, N) long, the same rows counted among those that the stage before had left.
        valid: (B, N) bool, False at filler, or None where there is none.
    """

    rows: Tensor
    local: Tensor
    valid: Tensor | None


class Run:
    """State of one forward, carried from layer to layer in the call's kwargs.

    Without a plan (or with one that drops nothing) the run only makes the layers follow what an earlier prefill left
    in the cache.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        rules: Rules,
        past: int,
        length: int,
        plan: Plan | None = None,
        memory: CacheMemory | None = None,
        labels: Tensor | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.anatomy, self.rules, self.plan = anatomy, rules, plan
        self.past, self.length = past, length
        self.memory = memory
        self.labels = labels
        self.shift_labels: Tensor | None = None
        self.trace = trace
        # What the cache held before this call; `memory` grows while the call runs.
        self._earlier: dict[int, Slots] = dict(memory.slots) if memory else {}
        self._earlier_shift: dict[int, Tensor] = dict(memory.shift) if memory else {}
        self._kept: dict[int, Kept | None] = {0: None}
        self._scores: dict[int, Tensor] = {}
        self._memo: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}

    # ---- before a decoder layer ------------------------------------------------------------------------------------

    def enter(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> tuple[Tensor, Kwargs]:
        """What decoder layer `index` shall get instead of `hidden` (B, N, D) and the text model's `kwargs`."""
        stage = self.rules.schedule.stage_of(index)
        if self.plan is not None and self.plan.drops:
            if stage and self.plan.stages[stage - 1].layer == index:
                if stage not in self._kept:
                    self._end_stage(stage, index, layer, hidden, kwargs)
                if self.plan.stages[stage - 1].drops:
                    hidden = take_rows(hidden, self._rows(stage).local)
            if self.rules.rank_layer == "last":
                self._rank_ahead(stage, index, layer, hidden, kwargs)
        return hidden, self._follow(stage, index, hidden, kwargs)

    def _rows(self, stage: int) -> Kept:
        kept = self._kept[stage]
        assert kept is not None
        return kept

    @torch.no_grad()
    def _end_stage(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> None:
        """Decide which rows stay, and write it down: for later layers, for the cache, for the trace."""
        assert self.plan is not None
        if self.plan.stages[stage - 1].drops:
            self._kept[stage] = self._decide(stage, index, layer, hidden, kwargs)
        else:
            self._kept[stage] = self._kept[stage - 1]
        kept, cache = self._kept[stage], kwargs.get("past_key_values")
        if kept is not None and cache is not None:
            self._remember(stage, kept, cache, kwargs)
        self._record(stage, kept)

    def _decide(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> Kept:
        assert self.plan is not None
        plan, ending = self.plan, self.plan.stages[stage - 1]
        if stage in self._scores:
            scores = self._scores.pop(stage)
        else:
            scores = self._score(stage, stage - 1, index, layer, hidden, kwargs)
        rows, alive = self._present(stage - 1)
        visual = plan.visual.gather(1, rows) & alive
        scores = scores.masked_fill(plan.protected.gather(1, rows), float("inf"))
        stays = select(scores, visual, plan.groups.gather(1, rows), ending.quota) | (alive & ~visual)
        local, valid = compact(stays, ending.length, ending.ragged)
        return Kept(rows.gather(1, local), local, valid)

    def _present(self, stage: int) -> tuple[Tensor, Tensor]:
        """(B, N) rows that are there when `stage` drops are behind, and (B, N) bool which of them are not filler."""
        assert self.plan is not None
        kept = self._kept[stage]
        if kept is not None:
            rows, valid = kept.rows, kept.valid
        else:
            rows = torch.arange(self.length, device=self.plan.visual.device).expand(len(self.plan.visual), -1)
            valid = self.plan.valid
        return rows, torch.ones_like(rows, dtype=torch.bool) if valid is None else valid

    def _remember(self, stage: int, kept: Kept, cache: Any, kwargs: Kwargs) -> None:
        if self.memory is None:
            self.memory = CacheMemory(self.rules.schedule.layers, self.rules.positions)
            self.memory.attach(cache)
        empty = Slots(kept.rows[:, :0], None, 0)
        earlier = self._earlier.get(stage, empty)
        self.memory.slots[stage] = earlier.extended(kept.rows, kept.valid, self.past, self.length)
        if self.rules.positions == "compact":
            original = self._full_positions(kwargs["position_ids"]).gather(1, kept.rows[:, -1:])
            self.memory.shift[stage] = original - self._renumbered(stage, kept, kwargs["position_ids"])[:, -1:]

    def _record(self, stage: int, kept: Kept | None) -> None:
        if self.trace is not None and self.plan is not None:
            rows, alive = self._present(stage)
            visual = self.plan.visual.gather(1, rows) & alive
            ending = self.plan.stages[stage - 1]
            self.trace.record(ending.layer, ending.keep, rows, visual, self.past)

    # ---- ranking ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rank_ahead(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> None:
        """Where the stage's last layer ranks: score in layer `index` for the stage that ends before the next one."""
        assert self.plan is not None
        ends = stage < len(self.plan.stages) and self.plan.stages[stage].layer == index + 1
        if ends and self.plan.stages[stage].drops and stage + 1 not in self._kept:
            self._scores[stage + 1] = self._score(stage + 1, stage, index, layer, hidden, kwargs)

    def _score(self, stage: int, present: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """(B, N) scores of the rows that are there when `present` drops are behind, for the end of `stage`."""
        assert self.plan is not None
        rows, alive = self._present(present)
        return self.rules.scorer(
            Evidence(
                visual=self.plan.visual.gather(1, rows) & alive,
                ordinal=self.plan.ordinal.gather(1, rows),
                groups=self.plan.groups.gather(1, rows),
                quota=self.plan.stages[stage - 1].quota,
                hidden=hidden,
                attention=lambda: self._attention(present, index, layer, hidden, kwargs),
            )
        )

    def _attention(self, present: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """(B, N) the attention that each present row receives from the query tokens in layer `index`."""
        assert self.plan is not None
        rows, alive = self._present(present)
        columns = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        where = torch.zeros(len(rows), self.length, dtype=torch.long, device=rows.device).scatter(1, rows, columns)
        # At the numbering of this layer's own cache, which may have dropped more of an earlier turn than `present`.
        positions = self._positions(self._kept[present], hidden, kwargs, self.rules.schedule.stage_of(index))
        with _no_dropout(layer):
            seen = project(layer, hidden, positions["position_embeddings"], where.gather(1, self.plan.queries))
        keys, slots = self._with_past(index, seen.keys, Slots(rows, alive, 0), kwargs.get("past_key_values"))
        visible = self._visible(kwargs.get("attention_mask"), slots)
        received = attention_received(seen.queries, keys, visible, self.plan.weights, seen.scale)
        return received[:, -rows.shape[1] :]

    def _with_past(self, index: int, keys: Tensor, present: Slots, cache: Any) -> tuple[Tensor, Slots]:
        """The keys of layer `index` with those that the cache holds before them, and which columns they all are."""
        if not self.past:
            return keys, present
        stage = self.rules.schedule.stage_of(index)
        empty = Slots(present.columns[:, :0], present.columns[:, :0].bool(), 0)
        before = self._earlier.get(stage, empty).until(self.past)
        cached = cache.layers[index].keys[:, :, : before.columns.shape[1]].to(keys.device)
        valid = before.columns.new_ones(before.columns.shape).bool() if before.valid is None else before.valid
        if cached.shape[2] != before.columns.shape[1]:
            raise ValueError(
                f"a further image on top of a {type(cache).__name__} is not supported, for its keys cannot be read "
                "back; use a DynamicCache or a StaticCache"
            )
        columns = torch.cat([before.columns, present.columns + self.past], 1)
        assert present.valid is not None
        return torch.cat([cached, keys], 2), Slots(columns, torch.cat([valid, present.valid], 1), 0)

    def _visible(self, mask: Tensor | None, slots: Slots) -> Tensor:
        """(B, 1 or H, Q, K) which `slots` the query tokens see, by the text model's own full-length `mask`."""
        assert self.plan is not None
        seen = causal(self.plan.queries + self.past, slots)
        if mask is None:
            return seen
        if mask.dim() == 2:
            return seen & mask.bool().gather(1, slots.columns)[:, None, None]
        rows = take_rows(mask.transpose(1, 2), self.plan.queries).transpose(1, 2)
        assert slots.valid is not None
        return hide(take_columns(rows, slots.columns), slots.valid[:, None, None])

    # ---- following -------------------------------------------------------------------------------------------------

    def _follow(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """The kwargs of a layer with `stage` drops behind it: mask, positions and whatever is kept per token."""
        kept = self._kept.get(stage)
        slots = self.memory.slots.get(stage) if self.memory else None
        if kept is None and slots is None:
            return kwargs
        if slots is None:
            assert kept is not None
            slots = Slots(kept.rows, kept.valid, self.length)
        followed = dict(kwargs)
        if kept is not None:
            followed.update(self._per_token(stage, kept, kwargs))
        followed.update(self._positions_once(stage, kept, hidden, kwargs))
        followed["attention_mask"] = self._mask(stage, index, kept, slots, kwargs)
        return followed

    def _mask(self, stage: int, index: int, kept: Kept | None, slots: Slots, kwargs: Kwargs) -> Tensor | None:
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        width = cache.layers[index].max_cache_len if cache is not None and cache.is_compileable else None
        rows = kept.rows if kept else None
        followed: Tensor | None = self._once(
            ("mask", stage, width),
            mask,
            lambda: follow_mask(mask, rows, slots, self.past, self.length, self.anatomy.attention, width),
        )
        return followed

    def _positions_once(self, stage: int, kept: Kept | None, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        source = kwargs.get("position_embeddings")
        found: Kwargs = self._once(("positions", stage), source, lambda: self._positions(kept, hidden, kwargs, stage))
        return found

    def _positions(self, kept: Kept | None, hidden: Tensor, kwargs: Kwargs, stage: int) -> Kwargs:
        """`position_ids` and `position_embeddings` of the rows in `kept`; renumbered on the cache of `stage`."""
        ids, embeddings = kwargs["position_ids"], kwargs["position_embeddings"]
        if self.rules.positions == "compact":
            if kept is None and stage not in self._earlier_shift:
                return {"position_ids": ids, "position_embeddings": embeddings}
            if kept is not None:
                renumbered = self._renumbered(stage, kept, ids)
            else:
                renumbered = self._full_positions(ids) - self._earlier_shift[stage].to(ids.device)
            return {"position_ids": renumbered, "position_embeddings": self.anatomy.rotary(hidden, renumbered)}
        if kept is None:
            return {"position_ids": ids, "position_embeddings": embeddings}
        gathered = tuple(take_positions(table, kept.rows) for table in embeddings)
        # Flash attention would take the gaps between the ids for packed sequences; the embeddings hold all it needs.
        flash = self.anatomy.attention.startswith("flash")
        return {"position_ids": None if flash else take_positions(ids, kept.rows), "position_embeddings": gathered}

    def _per_token(self, stage: int, kept: Kept, kwargs: Kwargs) -> Kwargs:
        """Every other tensor of this call's length, e.g. token types."""
        found = {}
        for name, value in kwargs.items():
            if name in ("attention_mask", "position_ids") or not isinstance(value, Tensor):
                continue
            if value.dim() >= 2 and value.shape[1] == self.length:
                found[name] = self._once((name, stage), value, partial(take_rows, value, kept.rows))
        return found

    def _once(self, key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
        """Work out a follower of `source` once a stage (identity, not `id`: compiled graphs must not guard on it)."""
        followers = self._memo.setdefault(key, [])
        for held, follower in followers:
            if held is source:
                return follower
        followers.append((source, make()))
        return followers[-1][1]

    # ---- renumbered positions --------------------------------------------------------------------------------------

    def _full_positions(self, position_ids: Tensor) -> Tensor:
        batch = len(self.plan.visual) if self.plan is not None else len(position_ids)
        return position_ids.expand(batch, -1) if len(position_ids) == 1 else position_ids

    def _renumbered(self, stage: int, kept: Kept, position_ids: Tensor) -> Tensor:
        """(B, N) consecutive positions; a further turn goes on where the one before ended."""
        valid = torch.ones_like(kept.rows) if kept.valid is None else kept.valid.long()
        consecutive = (valid.cumsum(1) - 1).clamp(min=0)
        if not self.past:
            return consecutive
        start = valid.argmax(1, keepdim=True)
        first = self._full_positions(position_ids).gather(1, kept.rows.gather(1, start))
        return first - self._earlier_shift.get(stage, torch.zeros_like(first)) + consecutive

    # ---- after the text model --------------------------------------------------------------------------------------

    def leave(self, output: Any) -> Any:
        """Put rows back to the columns where the caller expects them; rows of dropped tokens are zero."""
        kept = self._kept.get(len(self.rules.schedule.stages))
        if kept is None:
            return output
        if isinstance(output, tuple):
            return (self._given_back(output[0], kept), *output[1:])
        output.last_hidden_state = self._given_back(output.last_hidden_state, kept)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                self._full_hidden(max(number - 1, 0), state) for number, state in enumerate(output.hidden_states)
            )
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(self._full_attention(*item) for item in enumerate(output.attentions))
        return output

    def _given_back(self, hidden: Tensor, kept: Kept) -> Tensor:
        if self.shift_labels is None or self.labels is None:
            return scatter_rows(hidden, kept.rows, kept.valid, self.length)
        following = torch.nn.functional.pad(self.labels, (0, 1), value=-100)[:, 1:]
        self.shift_labels.copy_(following.to(kept.rows.device).gather(1, kept.rows))
        if kept.valid is not None:
            self.shift_labels.masked_fill_(~kept.valid.to(self.shift_labels.device), -100)
        return hidden

    def _full_hidden(self, index: int, hidden: Tensor | None) -> Tensor | None:
        kept = self._kept.get(self.rules.schedule.stage_of(index))
        if hidden is None or kept is None:
            return hidden
        return scatter_rows(hidden, kept.rows, kept.valid, self.length)

    def _full_attention(self, index: int, weights: Tensor | None) -> Tensor | None:
        """(B, H, N, K) attention weights of layer `index` as (B, H, length, past + length)."""
        stage = self.rules.schedule.stage_of(index)
        kept = self._kept.get(stage)
        if weights is None or kept is None:
            return weights
        weights = scatter_rows(weights, kept.rows, kept.valid, self.length, dim=2)
        slots = self.memory.slots[stage] if self.memory else Slots(kept.rows, kept.valid, self.length)
        weights = weights[..., : slots.columns.shape[1]]
        return scatter_rows(weights, slots.columns, slots.valid, self.past + self.length, dim=3)


@contextmanager
def _no_dropout(layer: nn.Module) -> Iterator[None]:
    """Rank without dropout (LoRA's, say): a decision must neither be noisy nor move the random state of training."""
    training = [module for module in layer.modules() if module.training] if layer.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
