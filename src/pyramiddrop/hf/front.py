"""Dropping before the decoder: the text model gets a shorter prompt, and its caller the rows that it expects.

For the controls that papers are compared with. It stands on the same hooks as staged dropping, but there is nothing to
follow inside: masks and positions are cut once, and the KV cache of every layer is equally short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.anatomy import Anatomy, UnsupportedModelError
from pyramiddrop.hf.attachment import Attachment
from pyramiddrop.hf.following import Kwargs, per_token
from pyramiddrop.hf.limits import check_grouping
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.request import GivenMasks, call_shape
from pyramiddrop.hf.rows import scatter_rows, take_next_labels, take_rows
from pyramiddrop.hf.run import Rules
from pyramiddrop.hf.tower import Shrunk, Tower, Watch, small_side
from pyramiddrop.schedule import FrontSchedule
from pyramiddrop.scoring import Evidence
from pyramiddrop.selection import compact, select
from pyramiddrop.trace import Ranked

_MEMORY = "pyramiddrop_front"


@dataclass(frozen=True)
class _Memory:
    """What a cache holds of a prompt of `length` columns: (B, n) `rows`, and which of them are `valid`."""

    length: int
    rows: Tensor
    valid: Tensor | None


class FrontAttachment(Attachment):
    """A method that drops before the decoder, on a model.

    Args:
        shrinks: whether the vision tower sees a smaller picture, and its tokens are those that stay.

    Raises:
        RuntimeError: where the model has a method already.
        UnsupportedModelError: where the model cannot work so.
    """

    def __init__(self, parts: Anatomy, rules: Rules, given: GivenMasks, shrinks: bool) -> None:
        windowed = [index for index, span in enumerate(parts.spans) if span.kind != "full"]
        if windowed:
            raise UnsupportedModelError(
                f"{type(parts.text).__name__} cannot drop before its first layer: layer {windowed[0]} does not see "
                "everything, and would count what is left"
            )
        self.watch = Watch(Tower(parts)) if rules.scorer.watches else None
        self.shrunk: Shrunk | None = None
        if shrinks:
            tower = Tower(parts)
            self.shrunk = Shrunk(tower, small_side(tower.side, rules.schedule.keep[0]))
            rules = replace(rules, schedule=FrontSchedule.keeping(self.shrunk.share))
        super().__init__(parts, rules, given)

    def _check(self) -> None:
        check_grouping(self.anatomy, self.rules.grouping)

    def _attach(self) -> None:
        super()._attach()
        for part in (self.watch, self.shrunk):
            self._handles += part.attach() if part else []

    def _open_eagerly(self, call: Kwargs, cache: Any) -> Any:
        past = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None and cache.is_compileable:
            raise ValueError(f"a {type(cache).__name__} is not supported where tokens are dropped before the decoder")
        memory: _Memory | None = getattr(cache, _MEMORY, None) if past else None
        if cache is not None and not past:
            cache.__dict__.pop(_MEMORY, None)
        generation = self._generation()
        first = generation is None or generation.prompt is None
        plan = self._plan(call, past, generation)
        if plan is not None and first:
            self._begin_trace(plan)
        if plan is not None and past and plan.drops:
            raise ValueError(
                "a further image on top of a cache is not supported where tokens are dropped before the decoder; give "
                "the whole conversation without a cache"
            )
        if plan is not None and plan.drops:
            tokens: Tensor = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
            labels = call.get("labels") if self.rules.logits == "kept" else None
            return _Prompt(self, plan.to(tokens.device), cache, labels, first)
        shape = call_shape(call)
        assert shape is not None
        return None if memory is None else _Step(memory, past, shape[1], self.rules.positions == "compact")


class _Prompt:
    """A forward that drops; it has the ways of `hf.run.Run`."""

    def __init__(
        self, attachment: FrontAttachment, plan: Plan, cache: Any, labels: Tensor | None, traced: bool
    ) -> None:
        self.attachment, self.plan, self.cache, self.traced = attachment, plan, cache, traced
        self.rows, self.valid = plan.visual, plan.valid
        self._labels = labels
        self.shift_labels: Tensor | None = None
        if labels is not None:
            self.shift_labels = labels.new_full((len(labels), plan.stages[-1].length), -100)

    def enter(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> tuple[Tensor, Kwargs]:
        return hidden, kwargs

    def arrive(self, kwargs: Kwargs) -> Kwargs:
        """The text model's `kwargs` with the rows that stay alone."""
        hidden = kwargs.get("inputs_embeds")
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        flat = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if hidden is None or not flat or (ids is not None and ids.dim() != 2):
            raise UnsupportedModelError(
                f"{type(self.attachment.anatomy.text).__name__} cannot drop before its first layer: it is not called "
                "with embeddings, a two-dimensional mask and positions of one axis"
            )
        self._choose(hidden)
        ids = torch.arange(hidden.shape[1], device=hidden.device)[None] if ids is None else ids
        ids = take_rows(ids.expand(len(self.rows), -1), self.rows)
        left = self.valid if self.valid is not None else torch.ones_like(self.rows, dtype=torch.bool)
        if self.attachment.rules.positions == "compact":
            ids = (left.long().cumsum(1) - 1).clamp(min=0)
        others = {name: take_rows(kwargs[name], self.rows) for name in per_token(kwargs, hidden.shape[1])}
        if self.cache is not None:
            setattr(self.cache, _MEMORY, _Memory(self.plan.length, self.rows, self.valid))
        # Never without a mask: Transformers would take gaps between positions for the bounds of packed sequences.
        return {**kwargs, **others, "attention_mask": left.long(), "position_ids": ids}

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> None:
        """Decide which rows stay, and tell the trace."""
        plan, ending = self.plan, self.plan.stages[0]
        scores = self._scores(hidden)
        protected = scores.masked_fill(plan.protected, float("inf"))
        alive = torch.ones_like(plan.visual) if plan.valid is None else plan.valid
        stays = select(protected, plan.visual, plan.groups, ending.quota) | (alive & ~plan.visual)
        self.rows, self.valid = compact(stays, ending.length, ending.ragged)
        if self.traced:
            every = torch.arange(plan.length, device=stays.device).expand_as(stays)
            left = plan.visual.gather(1, self.rows) & stays.gather(1, self.rows)
            ranked = Ranked(every, plan.visual, scores)
            self.attachment.trace.record(0, ending.keep, self.rows, left, 0, ranked)

    def _scores(self, hidden: Tensor) -> Tensor:
        """(B, L)."""
        plan, shrunk, watch = self.plan, self.attachment.shrunk, self.attachment.watch
        if shrunk is not None:
            return self._by_patch(shrunk.firsts().float().to(hidden.device)[None])
        return self.attachment.rules.scorer(
            Evidence(
                layer=0,
                visual=plan.visual,
                ordinal=plan.ordinal,
                groups=plan.groups,
                quota=plan.stages[0].quota,
                hidden=hidden,
                attention=_nobody_asks,
                keys=_nobody_asks,
                vision=None if watch is None else self._by_patch(watch.received),
            )
        )

    def _by_patch(self, values: Tensor | None) -> Tensor:
        """(B, L) of values by picture and patch (pictures, patches), or of one row for all pictures."""
        visual = self.plan.visual
        total = int(visual.sum())
        if values is None or total % values.shape[1] or len(values) not in (1, total // values.shape[1]):
            raise ValueError(
                f"the {total} visual tokens of this call are not the patches that its vision tower has seen (beams and "
                "images given as embeddings cannot be told apart here); leave beams out"
            )
        flat = values.expand(total // values.shape[1], -1).flatten().to(visual.device).float()
        return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, flat)

    def leave(self, output: Any) -> Any:
        """Put rows back to the columns where the caller expects them; rows of dropped tokens are zero."""
        states = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if states.shape[1] != self.rows.shape[1]:
            return output
        if self.shift_labels is not None and self._labels is not None:
            self.shift_labels.copy_(take_next_labels(self._labels, self.rows, self.valid))
            return output
        if isinstance(output, tuple):
            return (self._full(output[0]), *output[1:])
        output.last_hidden_state = self._full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._full(state) for state in output.hidden_states)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(None if one is None else self._full_attention(one) for one in output.attentions)
        return output

    def _full(self, states: Tensor) -> Tensor:
        return scatter_rows(states, self.rows, self.valid, self.plan.length)

    def _full_attention(self, weights: Tensor) -> Tensor:
        weights = scatter_rows(weights, self.rows, self.valid, self.plan.length, dim=2)
        return scatter_rows(weights[..., : self.rows.shape[1]], self.rows, self.valid, self.plan.length, dim=3)


class _Step:
    """A forward on top of a cache from which tokens were left out; it has the ways of `hf.run.Run`."""

    shift_labels: Tensor | None = None

    def __init__(self, memory: _Memory, past: int, new: int, renumbered: bool) -> None:
        self.memory, self.past, self.new, self.renumbered = memory, past, new, renumbered

    def enter(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> tuple[Tensor, Kwargs]:
        return hidden, kwargs

    def arrive(self, kwargs: Kwargs) -> Kwargs:
        """The text model's `kwargs` with a mask of the slots that are there, and positions behind the whole prompt."""
        memory, hidden, mask = self.memory, kwargs["inputs_embeds"], kwargs.get("attention_mask")
        answered = self.past - memory.rows.shape[1]  # tokens between the prompt and this call
        alive = torch.ones_like(memory.rows, dtype=torch.bool) if memory.valid is None else memory.valid
        if mask is not None:
            alive = alive & mask[:, : memory.length].gather(1, memory.rows.to(mask.device)).bool()
        later = alive.new_ones(len(alive), answered + self.new)
        if mask is not None:
            later = mask[:, memory.length :].bool()
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = torch.arange(self.new, device=hidden.device)[None] + memory.length + answered
        if self.renumbered:
            kept = alive.long().sum(1, keepdim=True)
            ids = (kept + later.long().cumsum(1) - 1)[:, -self.new :]
        return {**kwargs, "attention_mask": torch.cat([alive, later], 1).long(), "position_ids": ids}

    def leave(self, output: Any) -> Any:
        return output


def _nobody_asks(**options: bool) -> Tensor:
    raise UnsupportedModelError(
        "before the decoder there is no layer that could rank: score must be one that needs no attention of it"
    )
