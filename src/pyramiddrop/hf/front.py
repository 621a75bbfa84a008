"""Dropping before the decoder: the text model gets a shorter prompt, and its caller the rows that it expects.

For the controls that papers are compared with. It stands on the same hooks as staged dropping, but there is nothing to
follow inside: masks and positions are cut once, and the KV cache of every layer is equally short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.anatomy import Anatomy, UnsupportedModelError
from pyramiddrop.hf.attachment import Attachment
from pyramiddrop.hf.cache_layer import RowMemory, forget, memory_of, remember
from pyramiddrop.hf.choosing import choose, present
from pyramiddrop.hf.compatibility import check_signatures, number_run
from pyramiddrop.hf.following import Kwargs, per_token
from pyramiddrop.hf.generation import Generation
from pyramiddrop.hf.limits import check_grouping
from pyramiddrop.hf.memory import cache_made, check_lengths, past_length
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.request import GivenMasks, call_shape
from pyramiddrop.hf.rows import Kept, give_back, scatter_rows, take_next_labels, take_rows
from pyramiddrop.hf.run import Rules
from pyramiddrop.hf.tower import Shrunk, Tower, Watch, small_side
from pyramiddrop.hf.versions import let_crop_follow
from pyramiddrop.schedule import FrontSchedule
from pyramiddrop.scoring import Evidence
from pyramiddrop.trace import Ranked, Trace


@dataclass
class _Memory(RowMemory):
    """What a cache holds of a prompt of `length` columns: the rows that were `kept`, with their `positions`."""

    length: int
    kept: Kept
    positions: str

    @staticmethod
    def of(cache: Any, past: int, batch: int, positions: str) -> _Memory | None:
        """The memory of a cache that holds `past` tokens, for a call of this `batch`; None where there is none.

        Raises:
            ValueError: where a call cannot go on with the cache.
        """
        memory = memory_of(cache)
        if memory is None:
            return None
        if not isinstance(memory, _Memory) or memory.positions != positions:
            raise ValueError(
                "this KV cache was pruned by another method, and cannot be continued by one that drops before the "
                f"decoder with positions={positions!r}; go on with the method that filled it, or start without it"
            )
        held, rows = memory.kept.rows.shape
        if held != batch:
            raise ValueError(f"this KV cache was pruned for a batch of {held}; this call has a batch of {batch}")
        if past < rows:
            raise ValueError(
                f"this KV cache holds {past} tokens of a prompt of which {rows} were kept: it was cropped into that "
                "prompt, or something else has removed keys from it, such as a press of kvpress. Crop only what "
                "follows the prompt, and use one method at a time"
            )
        return memory

    def select(self, pick: Callable[[Tensor], Tensor]) -> _Memory:
        """The memory of the rows that `pick` takes of a (B, ...) tensor."""
        kept = self.kept
        valid = None if kept.valid is None else pick(kept.valid)
        return replace(self, kept=Kept(pick(kept.rows), pick(kept.local), valid))


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
        check_signatures(self.anatomy)
        check_grouping(self.anatomy, self.rules.grouping)

    def _attach(self) -> None:
        super()._attach()
        for part in (self.watch, self.shrunk):
            self._handles += part.attach() if part else []

    def _open_eagerly(self, call: Kwargs, cache: Any) -> Any:
        past = past_length(cache)
        if cache is not None and cache.is_compileable:
            raise UnsupportedModelError(
                f"a {type(cache).__name__} is not supported where tokens are dropped before the decoder; use a "
                "DynamicCache"
            )
        shape = call_shape(call)
        assert shape is not None
        if not past:
            forget(cache)
        memory = _Memory.of(cache, past, shape[0], self.rules.positions)
        if memory is not None:
            memory.called = True
        generation = self._generation()
        first = generation is None or generation.is_first
        step = generation is not None and generation.continues(call)
        own = generation if step or (generation is not None and not generation.started) else None
        plan = self._plan(call, past, generation, step)
        trace = self._begin_trace(plan) if plan is not None and first else None
        if plan is not None and past and plan.drops:
            raise ValueError(
                "a further image on top of a cache is not supported where tokens are dropped before the decoder; give "
                "the whole conversation without a cache"
            )
        if plan is not None and plan.packing is not None and plan.drops:
            raise ValueError(
                "packed rows (several documents in one, whose position_ids start again) are not supported where tokens "
                "are dropped before the decoder; give each document a row of its own, or use a staged method"
            )
        if plan is not None and plan.drops:
            tokens: Tensor = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
            self._ignore_labels(call, plan)
            labels = call.get("labels") if self.rules.logits == "kept" else None
            return _Prompt(self, plan.to(tokens.device), cache, labels, trace, own)
        return None if memory is None else _Step(memory, past, shape[1], self.rules.positions == "compact")


class _Prompt:
    """A forward that drops; it has the ways of `hf.run.Run`."""

    def __init__(
        self,
        attachment: FrontAttachment,
        plan: Plan,
        cache: Any,
        labels: Tensor | None,
        trace: Trace | None,
        generation: Generation | None,
    ) -> None:
        self.generation = generation  # of which this is the prompt or a step, if any
        self.attachment, self.plan, self.cache, self.trace = attachment, plan, cache, trace
        self._kept: Kept | None = None
        self.unreached: int | None = number_run()
        self._labels = labels
        self.shift_labels: Tensor | None = None
        if labels is not None:
            self.shift_labels = labels.new_full((len(labels), plan.stages[-1].length), -100)

    def enter(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> tuple[Tensor, Kwargs]:
        return hidden, kwargs

    def arrive(self, kwargs: Kwargs) -> Kwargs:
        """The text model's `kwargs` with the rows that stay alone, chosen on the device of its embeddings."""
        self.unreached = None
        hidden = kwargs.get("inputs_embeds")
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        flat = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if hidden is None or not flat or (ids is not None and ids.dim() != 2):
            raise UnsupportedModelError(
                f"{type(self.attachment.anatomy.text).__name__} cannot drop before its first layer: it is not called "
                "with embeddings, a two-dimensional mask and positions of one axis"
            )
        self.plan = self.plan.to(hidden.device)
        kept = self._kept = self._choose(hidden)
        ids = torch.arange(hidden.shape[1], device=hidden.device)[None] if ids is None else ids
        ids = take_rows(ids.expand(len(kept.rows), -1), kept.rows)
        left = _alive(kept)
        if self.attachment.rules.positions == "compact":
            ids = (left.long().cumsum(1) - 1).clamp(min=0)
        others = {name: take_rows(kwargs[name], kept.rows) for name in per_token(kwargs, hidden.shape[1])}
        # Never without a mask: Transformers would take gaps between positions for the bounds of packed sequences.
        return {**kwargs, **others, "attention_mask": left.long(), "position_ids": ids}

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> Kept:
        """The rows that stay; the trace is told."""
        scores = self._scores(hidden)
        kept = choose(self.plan, 1, None, scores)
        if self.trace is not None:
            every, _, candidates = present(self.plan, None)
            rows, _, visual = present(self.plan, kept)
            ranked = Ranked(every, candidates, scores)
            self.trace.record(0, self.plan.stages[0].keep, rows, visual, 0, ranked)
        return kept

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
                vision=self._by_patch(self._vision(watch)) if watch else None,
            )
        )

    def _vision(self, watch: Watch) -> Tensor | None:
        """What the vision tower told of this prompt's pictures; of a generation's at its start, for the tower may have
        looked at others since."""
        if self.generation is None:
            return watch.received
        if self.generation.vision is None:
            self.generation.vision = watch.received
        return self.generation.vision

    def _by_patch(self, values: Tensor | None) -> Tensor:
        """(B, L) of values by picture and patch (pictures, patches), or of one row for all pictures."""
        visual = self.plan.visual
        total = int(visual.sum())
        if values is None or total % values.shape[1] or len(values) not in (1, total // values.shape[1]):
            raise UnsupportedModelError(
                f"the {total} visual tokens of this call are not the patches that its vision tower has seen (beams and "
                "images given as embeddings cannot be told apart here); leave beams out"
            )
        flat = values.expand(total // values.shape[1], -1).flatten().to(visual.device).float()
        return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, flat)

    def leave(self, output: Any) -> Any:
        """Put rows back to the columns where the caller expects them; rows of dropped tokens are zero."""
        kept, labels, length = self._kept, self._labels, self.plan.length
        cache = self.cache or cache_made(output)
        if kept is not None and cache is not None:
            check_lengths(cache, kept.rows.shape[1], dict.fromkeys(self.attachment.anatomy.caching, 1), None)
            remember(cache, _Memory(length, kept, self.attachment.rules.positions))
            let_crop_follow(cache, length - kept.rows.shape[1])
        if kept is None or output[0].shape[1] != kept.rows.shape[1]:
            return output

        def full(states: Tensor, dim: int = 1) -> Tensor:
            return scatter_rows(states, kept.rows, kept.valid, length, dim)

        def hidden(index: int, states: Tensor | None) -> Tensor | None:
            return None if states is None else full(states)

        def attention(index: int, weights: Tensor | None) -> Tensor | None:
            return None if weights is None else full(full(weights, 2), 3)

        def last(states: Tensor) -> Tensor:
            if self.shift_labels is None or labels is None:
                return full(states)
            self.shift_labels.copy_(take_next_labels(labels, kept.rows, kept.valid))
            return states

        return give_back(output, last, hidden, attention)


class _Step:
    """A forward on top of a cache from which tokens were left out; it has the ways of `hf.run.Run`."""

    shift_labels: Tensor | None = None
    unreached: int | None = None
    trace: Trace | None = None

    def __init__(self, memory: _Memory, past: int, new: int, renumbered: bool) -> None:
        self.memory, self.past, self.new, self.renumbered = memory, past, new, renumbered

    def enter(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> tuple[Tensor, Kwargs]:
        return hidden, kwargs

    def arrive(self, kwargs: Kwargs) -> Kwargs:
        """The text model's `kwargs` with a mask of the slots that are there, and positions behind the whole prompt."""
        memory, hidden, mask = self.memory, kwargs["inputs_embeds"], kwargs.get("attention_mask")
        rows, alive = memory.kept.rows, _alive(memory.kept)
        answered = self.past - rows.shape[1]  # tokens between the prompt and this call
        later = alive.new_ones(len(alive), answered + self.new)
        if mask is not None:
            mask = mask.to(rows.device)
            alive = alive & mask[:, : memory.length].gather(1, rows).bool()
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


def _alive(kept: Kept) -> Tensor:
    """(B, n) False at filler."""
    return torch.ones_like(kept.rows, dtype=torch.bool) if kept.valid is None else kept.valid


def _nobody_asks(**options: bool) -> Tensor:
    raise UnsupportedModelError(
        "before the decoder there is no layer that could rank: score must be one that needs no attention of it"
    )
