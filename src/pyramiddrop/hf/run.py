"""One forward of a patched model: drop before each stage, prepare the inputs of each layer, restore full length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyramiddrop.cost import Choosing
from pyramiddrop.hf.cache_state import CacheIndex, CacheState, check_lengths, remember, static_width
from pyramiddrop.hf.compatibility import check_drops, number_run
from pyramiddrop.hf.layer_inputs import Kwargs, LayerInputs, first_table
from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.query_key import QueryKeyExtractor
from pyramiddrop.hf.ranking import Ranking, choose, present
from pyramiddrop.hf.rows import Selection, give_back, scatter_rows, take_hidden, take_next_labels, take_rows
from pyramiddrop.hf.versions import cache_of, let_crop_follow
from pyramiddrop.merging import merge
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import Scorer
from pyramiddrop.trace import Ranked, Trace


@dataclass(frozen=True)
class Rules:
    """The settings of a method, as the adapter needs them; the front door documents them."""

    schedule: Schedule
    scorer: Scorer
    positions: str
    rank_layer: str
    grouping: str
    logits: str
    merge: bool
    choosing: Choosing


class Step(NamedTuple):
    """The changes for a layer of a step of decoding, and the arguments of the text model that they follow."""

    mask: Any
    positions: Any
    changes: Kwargs


class Run:
    """State of one forward, carried from layer to layer in the call's kwargs.

    Args:
        anatomy: of the model.
        rules: of the method.
        past: columns that the KV cache held before.
        length: columns of this call.
        plan: what to drop, or None: then the layers only follow what an earlier call left in the cache.
        memory: of the KV cache, or None where nothing was ever dropped from it.
        labels: (B, length), where the caller wants a loss on the rows that are left.
        trace: to be filled, or None.
        padding: (B, past + length) the call's own 2-D attention mask, or None.
        projector: of the attachment.
    """

    def __init__(
        self,
        anatomy: ModelInfo,
        rules: Rules,
        past: int,
        length: int,
        plan: Plan | None = None,
        memory: CacheState | None = None,
        labels: Tensor | None = None,
        trace: Trace | None = None,
        padding: Tensor | None = None,
        projector: QueryKeyExtractor | None = None,
    ) -> None:
        self.anatomy, self.rules, self.past, self.length = anatomy, rules, past, length
        self.memory, self.trace = memory, trace
        self._cache: Any = None  # where this call leaves something to remember
        # What the cache held before this call; `memory` grows while the call runs.
        self._earlier: dict[int, CacheIndex] = dict(memory.slots) if memory else {}
        shift = dict(memory.shift) if memory else {}
        first = rules.schedule.layers[0]
        self._following = LayerInputs(anatomy, rules.positions, past, length, shift, first, padding, plan)
        self._ranking: Ranking | None = None
        self.unreached: int | None = None  # the number of a run that drops, until the text model is called with it
        if plan is not None:
            self.unreached = number_run()
            projector = projector or QueryKeyExtractor()
            self._ranking = Ranking(plan, rules.schedule, rules.scorer, self._following, self._earlier, projector)
        self._deepstack: DeepStack | None = None
        self._kept: dict[int, Selection | None] = {0: None}
        self._scores: dict[int, Tensor] = {}
        self._sizes: dict[int, Tensor] = {}
        self._previous: Tensor | None = None  # what the layer before received, where the scorer compares
        self._held: dict[tuple[int, int], CacheIndex | None] = {}
        self._steps: dict[tuple[int, int], Step] = {}
        self._labels = labels
        self.shift_labels: Tensor | None = None
        if plan is not None and labels is not None:
            self.shift_labels = labels.new_full((len(labels), plan.stages[-1].length), -100)

    # ---- before a decoder layer ------------------------------------------------------------------------------------

    def enter(self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> tuple[Tensor, Kwargs]:
        """What decoder layer `index`, in `stage`, gets instead of `hidden` (B, N, D) and the text model's `kwargs`."""
        if index == 0:
            self._move(hidden.device)
        if self._deepstack is not None:
            hidden = self._deepstack.add(index, hidden, self._kept[self.rules.schedule.stage_of(index - 1)])
        if self._ranking is None:
            changes = self._step(stage, index, hidden, kwargs)
        else:
            hidden = self._drop(self._ranking, stage, index, layer, hidden, kwargs)
            changes = self._changes(stage, index, hidden, kwargs)
        return hidden, {**kwargs, **changes} if changes else kwargs

    def _move(self, device: torch.device) -> None:
        """Decide where the text model has its masks and positions; the tokens of the call may be on another device."""
        following, ranking = self._following, self._ranking
        if following.padding is not None and following.padding.device != device:
            following.padding = following.padding.to(device)
        if ranking is not None and ranking.plan.visual.device != device:
            ranking.plan = ranking.plan.to(device)

    def _step(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """The changes for a layer of a call that drops nothing: worked out once for all layers alike, for in a step of
        decoding Python is what takes the time."""
        mask, positions = kwargs.get("attention_mask"), first_table(kwargs.get("position_embeddings"))
        kind = stage, self.anatomy.alike[index]
        step = self._steps.get(kind)
        if step is None or step.mask is not mask or step.positions is not positions:
            step = self._steps[kind] = Step(mask, positions, self._changes(stage, index, hidden, kwargs))
        return step.changes

    def _changes(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        """What layer `index` is called with otherwise than by the text model."""
        source = self.anatomy.sources[index]
        kept, slots = self._kept.get(stage), self._slots(stage, source)
        if slots is None:
            return {}
        if kept is not None and hidden.shape[-2] < kept.rows.shape[1]:
            kept = None  # the model itself has gone on with the last rows alone (Gemma 4), and cut its kwargs to them
        return self._following.changes(stage, index, kept, slots, self._written(stage, index, source), hidden, kwargs)

    def _written(self, stage: int, index: int, source: int) -> int:
        """How many rows of this call layer `source` has written, whose cache layer `index` reads."""
        kept = self._kept.get(stage if source == index else self.rules.schedule.stage_of(source))
        return self.length if kept is None else kept.rows.shape[1]

    def arrive(self, kwargs: Kwargs) -> Kwargs:
        """What the text model gets: its `kwargs` without the visual features that it would add to layers after a drop:
        those are added here, to the rows that are left."""
        if self._ranking is not None:
            self.unreached = None
            self._deepstack, kwargs = DeepStack.taken(kwargs, self.rules.schedule.layers[0])
        return kwargs

    def _drop(
        self, ranking: Ranking, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> Tensor:
        """Gather the rows that stay where layer `index` starts a stage; rank ahead where it is the last of one."""
        stages = ranking.plan.stages
        if stage and stages[stage - 1].layer == index:
            if stage not in self._kept:
                self._end_stage(ranking, stage, index, layer, hidden, kwargs)
            kept = self._kept[stage]
            if stages[stage - 1].drops and kept is not None:
                hidden = self._left(ranking, stage, kept, hidden)
        following = stage + 1
        ranks_ahead = self.rules.rank_layer == "last" and stage < len(stages) and stages[stage].layer == index + 1
        if ranks_ahead and stages[stage].drops and following not in self._kept:
            with torch.no_grad():
                kept = self._kept[stage]
                previous = self._previous
                if previous is not None and kept is not None and previous.shape[-2] != hidden.shape[-2]:
                    previous = take_hidden(previous, kept.local)
                self._scores[following] = ranking.score(following, kept, index, layer, hidden, previous, kwargs)
        self._previous = hidden if self.rules.scorer.needs_previous_hidden else None
        return hidden

    def _left(self, ranking: Ranking, stage: int, kept: Selection, hidden: Tensor) -> Tensor:
        """What the end of `stage` leaves of `hidden`; what goes is merged into it where the method says so."""
        if not self.rules.merge:
            return take_hidden(hidden, kept.local)
        rows, _, visual = present(ranking.plan, self._kept[stage - 1])
        earlier = [end for end in self._sizes if end < stage]  # ends that drop nothing leave the sizes as they are
        sizes = self._sizes[max(earlier)] if earlier else torch.ones(rows.shape, device=rows.device)
        groups = ranking.plan.groups.gather(1, rows)
        # Several hidden streams of a token (Gemma 3n) are compared and averaged as one.
        flat = hidden.movedim(0, -2).flatten(-2) if hidden.dim() == 4 else hidden
        sizes, visual, groups, local = (table.to(flat.device) for table in (sizes, visual, groups, kept.local))
        valid = None if kept.valid is None else kept.valid.to(flat.device)
        merged, self._sizes[stage] = merge(flat, sizes, visual, groups, local, valid)
        if hidden.dim() == 4:
            merged = merged.view(*merged.shape[:2], len(hidden), -1).movedim(-2, 0)
        return merged

    @torch.no_grad()
    def _end_stage(
        self, ranking: Ranking, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> None:
        """Decide which rows stay, and write it down: for later layers, for the cache, for the trace."""
        check_drops(self.anatomy.text, self._missed(index))
        before, ending = self._kept[stage - 1], ranking.plan.stages[stage - 1]
        kept, scores = before, None
        if ending.drops:
            scores = self._scores.pop(stage, None)
            if scores is None:
                scores = ranking.score(stage, before, index, layer, hidden, self._previous, kwargs)
            kept = choose(ranking.plan, stage, before, scores)
        self._kept[stage] = kept
        cache = cache_of(kwargs)
        if kept is not None and cache is not None:
            self._remember(stage, index, kept, cache, kwargs.get("position_ids"))
        if self.trace is not None:
            rows, _, visual = present(ranking.plan, kept)
            ranked = None
            if scores is not None:
                there, _, candidates = present(ranking.plan, before)
                ranked = Ranked(there, candidates, scores)
            self.trace.record(ending.layer, ending.keep, rows, visual, self.past, ranked)

    def _remember(self, stage: int, index: int, kept: Selection, cache: Any, position_ids: Tensor | None) -> None:
        if self.memory is None:
            self.memory = CacheState(self.rules.schedule.layers, self.rules.positions)
        self._cache = cache
        earlier = self._earlier.get(stage, CacheIndex(kept.rows[:, :0], None, 0))
        slots = earlier.extended(kept.rows, kept.valid, self.past, self.length)
        self.memory.hold(stage, slots, static_width(cache, index))
        if self.rules.positions == "compact":
            assert position_ids is not None
            self.memory.shift[stage] = self._following.new_shift(stage, kept, position_ids)

    def _slots(self, stage: int, source: int) -> CacheIndex | None:
        """What stands in the KV cache that a layer of `stage` reads, which is that of layer `source`; None where that
        is every column, and all of them may be seen."""
        if (stage, source) in self._held:
            return self._held[stage, source]
        own, held = self._cached(stage), self.rules.schedule.stage_of(source)
        slots = own
        if own is not None and held != stage:
            total = self.past + self.length
            own, all_columns = own.until(total), torch.arange(total, device=own.columns.device)
            slots = self._cached(held) or CacheIndex(all_columns.expand(len(own.columns), -1), None, total)
            slots = slots.until(total).among(own.columns, own.valid)
        if self._ranking is None or stage in self._kept:
            self._held[stage, source] = slots
        return slots

    def _cached(self, stage: int) -> CacheIndex | None:
        """The slots of a stage's own KV cache, once it has added this call's rows; None where that is every column."""
        if self.memory is None:
            kept = self._kept.get(stage)
            return None if kept is None else CacheIndex(kept.rows, kept.valid, self.length)
        if self._ranking is not None:
            slots = self.memory.slots.get(stage)
            return slots and slots.until(self.past + self.length)
        return self.memory.wide.get(stage) or self.memory.covering(stage, self.past + self.length)

    # ---- after the text model --------------------------------------------------------------------------------------

    def leave(self, output: Any) -> Any:
        """Put rows back to the columns where the caller expects them; rows of dropped tokens are zero."""
        # Fewer layers run where a model drafts for itself.
        check_drops(self.anatomy.text, self._missed(self.anatomy.text.config.num_hidden_layers))
        if self._cache is not None:
            self._hand_over(self._cache)
        kept = self._kept.get(len(self.rules.schedule.stages))
        if kept is None or output[0].shape[1] != kept.rows.shape[1]:
            return output
        return give_back(output, lambda hidden: self._given_back(hidden, kept), self._full_hidden, self._full_attention)

    def _missed(self, index: int) -> list[int]:
        """The layers before layer `index` that should have ended a stage and have not."""
        ends = enumerate(self._ranking.plan.stages, 1) if self._ranking is not None else ()
        return [stage.layer for number, stage in ends if number not in self._kept and stage.layer < index]

    def _hand_over(self, cache: Any) -> None:
        """Put the memory on the cache, once all layers are in it."""
        assert self.memory is not None
        stages = {index: self.rules.schedule.stage_of(index) for index in self.anatomy.caching}
        check_lengths(cache, self.past + self.length, stages, self.memory)
        remember(cache, self.memory)
        let_crop_follow(cache, {index: self.memory.missing(stage) for index, stage in stages.items()})

    def _given_back(self, hidden: Tensor, kept: Selection) -> Tensor:
        """The full length; or the rows that are left, with their labels beside them."""
        if self.shift_labels is None or self._labels is None:
            return scatter_rows(hidden, kept.rows, kept.valid, self.length)
        self.shift_labels.copy_(take_next_labels(self._labels, kept.rows, kept.valid))
        return hidden

    def _full_hidden(self, index: int, hidden: Tensor | None) -> Tensor | None:
        kept = self._kept.get(self.rules.schedule.stage_of(index))
        if hidden is None or kept is None:
            return hidden
        return scatter_rows(hidden, kept.rows, kept.valid, self.length)

    def _full_attention(self, index: int, weights: Tensor | None) -> Tensor | None:
        """(B, H, N, K) attention weights of layer `index` as (B, H, length, past + length)."""
        stage = self.rules.schedule.stage_of(index)
        kept, slots = self._kept.get(stage), self._slots(stage, index)
        if weights is None or kept is None or slots is None:
            return weights
        weights = scatter_rows(weights, kept.rows, kept.valid, self.length, dim=2)
        weights = weights[..., : slots.columns.shape[1]]  # a static cache is wider than what it holds
        return scatter_rows(weights, slots.columns, slots.valid, self.past + self.length, dim=3)


_BETWEEN = ("deepstack_visual_embeds", "visual_pos_masks")  # a list: entry i is added behind layer i
_BEFORE = ("deepstack_features", "vision_mask")  # a dict: entry i is added before layer i


class DeepStack:
    """The features that come in after tokens were dropped; the model's own loop adds those before.

    Args:
        features: layer -> (M, D), what is added to what the layer receives.
        visual: (B, L) bool, the M rows of the full sequence to which it is added.
    """

    def __init__(self, features: Mapping[int, Tensor], visual: Tensor) -> None:
        self.features, self.visual = features, visual

    @classmethod
    def taken(cls, kwargs: dict[str, Any], first: int) -> tuple[DeepStack | None, dict[str, Any]]:
        """Take over what the text model would add behind layer `first`, before which tokens are dropped first.

        Returns:
            it, or None where there is nothing, and the `kwargs` for the model's own loop.
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
        """`hidden` (B, N, D), the rows in `kept` that layer `index` receives, with what is added there."""
        features = self.features.get(index)
        if features is None:
            return hidden
        visual = self.visual.to(hidden.device)
        # Numbered through the batch, so that dropped rows' features are left out without a look at who was dropped.
        number = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape)
        if kept is not None:
            number, visual = take_rows(number, kept.rows), take_rows(visual, kept.rows)
        rows = features.to(hidden)[number.flatten()].view(*number.shape, -1)
        return torch.where(visual[..., None], hidden + rows, hidden)
