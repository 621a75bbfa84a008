"""A prefill that drops visual tokens: rank, select and gather rows before layers, then restore the full length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.cache_state import CacheIndex, CacheState, attach_state, check_lengths, static_width
from pyramiddrop.hf.compatibility import check_drops, number_run
from pyramiddrop.hf.forward import Forward
from pyramiddrop.hf.layer_inputs import DeepStack, Kwargs, LayerCall, LayerInputs
from pyramiddrop.hf.plan import GeneralPlan, LastTokenPlan
from pyramiddrop.hf.ranking import GeneralRanking, LastTokenRanking, Ranking, VisionScores
from pyramiddrop.hf.rows import Selection, scatter_rows, take_next_labels, take_rows
from pyramiddrop.hf.versions import cache_of, ignores_cache, let_crop_follow
from pyramiddrop.selection import merge
from pyramiddrop.trace import Trace


class Prefill(Forward):
    """A call that drops tokens: it ranks them and gathers the kept rows before layers, and restores the full length.

    Args:
        labels: (B, length), if the caller wants a loss on the remaining rows.
        trace: the trace to fill, or None.
        vision: gives the vision tower's score of each visual token for a drop before the decoder; or None.
    """

    def __init__(
        self,
        inputs: LayerInputs,
        cache_state: CacheState | None,
        labels: Tensor | None,
        trace: Trace | None,
        vision: VisionScores | None,
    ) -> None:
        super().__init__(inputs, cache_state)
        self.trace, self.unreached = trace, number_run()
        self._cache: Any = None  # if this call adds to the state
        # The cache before this call; `cache_state` grows while the call runs.
        self._earlier: dict[int, CacheIndex] = dict(cache_state.slots) if cache_state else {}
        plan, rules = inputs.plan, inputs.rules
        if isinstance(plan, LastTokenPlan):
            self._ranking: Ranking = LastTokenRanking(plan, inputs)
        else:
            assert isinstance(plan, GeneralPlan)
            self._ranking = GeneralRanking(plan, inputs, self._earlier, vision)
        self._deepstack: DeepStack | None = None
        self._drop_at = {drop.layer: number for number, drop in enumerate(plan.drops)}
        ahead = enumerate(rules.ranking_layers)
        self._ranks_ahead = {layer: drop for drop, layer in ahead if layer < rules.schedule.layers[drop]}
        self._kept: dict[int, Selection | None] = {0: None}  # by stage
        self._scores: dict[int, Tensor] = {}  # by drop, if an earlier layer ranks for it
        self._sizes: dict[int, Tensor] = {}  # by stage, tokens that each row stands for, if tokens are merged
        self._previous: Tensor | None = None  # the input of the layer before, if the scorer needs it
        self._labels = labels
        if labels is not None:
            self.shift_labels = labels.new_full((len(labels), plan.drops[-1].length), -100)

    def before_text(self, kwargs: Kwargs) -> Kwargs:
        """`kwargs` without the visual features that the text model would add after a drop; this class adds them to the
        remaining rows."""
        self.unreached = None
        self._deepstack, kwargs = DeepStack.taken(kwargs, self.rules.schedule.layers[0])
        return kwargs

    # ---- before a decoder layer ------------------------------------------------------------------------------------

    def before_layer(
        self, stage: int, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor, Kwargs]:
        if index == 0:
            self._move(hidden.device)
        if self._deepstack is not None:
            hidden = self._deepstack.add(index, hidden, self._kept[self.rules.schedule.stage_of(index - 1)])
        if index in self._drop_at:
            hidden = self._drop(self._drop_at[index], LayerCall(index, layer, hidden, kwargs))
        if index in self._ranks_ahead:
            self._rank_ahead(self._ranks_ahead[index], LayerCall(index, layer, hidden, kwargs))
        self._previous = hidden if self.rules.scorer.needs_previous_hidden else None
        return hidden, self._changed(stage, index, hidden, kwargs) if stage else kwargs

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self._ranking.move(device)
        self.inputs.plan = self._ranking.plan

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drop(self, drop: int, call: LayerCall) -> Tensor:
        """Gather the hidden states that `drop`, before the called layer, keeps."""
        if drop + 1 not in self._kept:  # gradient checkpointing calls this twice
            self._decide(drop, call)
        kept = self._kept[drop + 1]
        if kept is None or not self._ranking.plan.drops[drop].happens:
            return call.hidden
        merges = self.rules.merge and call.index > 0  # before the decoder nothing is merged
        return self._merged(drop, kept, call.hidden) if merges else take_rows(call.hidden, kept.index, -2)

    @torch.no_grad()
    def _decide(self, drop: int, call: LayerCall) -> None:
        """Decide which rows are kept, and record them for later layers, the cache and the trace."""
        check_drops(self.info.text, self._missed(call.index))
        planned, before, scores = self._ranking.plan.drops[drop], self._kept[drop], None
        kept = before
        if planned.happens:
            scores = self._scores.pop(drop, None)
            if scores is None and planned.ranks:
                scores = self._ranking.score(drop, before, call, self._previous)
            kept = self._ranking.choose(drop, before, scores)
        self._kept[drop + 1] = kept
        cache = cache_of(call.kwargs)
        if kept is not None and cache is not None:
            self._remember(drop + 1, call.index, kept, cache, call.kwargs.get("position_ids"))
        if self.trace is not None:
            self._ranking.record(self.trace, drop, before, kept, scores)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _rank_ahead(self, drop: int, call: LayerCall) -> None:
        """Score with the called layer for `drop`, which is before the next layer."""
        if drop + 1 in self._kept or not self._ranking.plan.drops[drop].ranks:
            return
        kept, previous = self._kept[drop], self._previous
        if previous is not None and kept is not None and previous.shape[-2] != call.hidden.shape[-2]:
            previous = take_rows(previous, kept.index, -2)
        self._scores[drop] = self._ranking.score(drop, kept, call, previous)

    def _merged(self, drop: int, kept: Selection, hidden: Tensor) -> Tensor:
        """The kept rows at `drop`, with the dropped tokens merged into them."""
        assert isinstance(self._ranking, GeneralRanking)  # a usual plan does not merge
        rows, _, visual = self._ranking.active_rows(self._kept[drop])
        earlier = [stage for stage in self._sizes if stage <= drop]  # a drop that does not happen does not change sizes
        sizes = self._sizes[max(earlier)] if earlier else torch.ones(rows.shape, device=rows.device)
        groups = self._ranking.plan.groups.gather(1, rows)
        # The hidden streams of a token (Gemma 3n) are compared and averaged together.
        flat = hidden.movedim(0, -2).flatten(-2) if hidden.dim() == 4 else hidden
        sizes, visual, groups, index = (table.to(flat.device) for table in (sizes, visual, groups, kept.index))
        valid = None if kept.valid is None else kept.valid.to(flat.device)
        merged, self._sizes[drop + 1] = merge(flat, sizes, visual, groups, index, valid)
        if hidden.dim() == 4:
            merged = merged.view(*merged.shape[:2], len(hidden), -1).movedim(-2, 0)
        return merged

    def _remember(self, stage: int, index: int, kept: Selection, cache: Any, position_ids: Tensor | None) -> None:
        if self.cache_state is None:
            self.cache_state = CacheState(self.rules.schedule.layers, self.rules.positions)
        self._cache = cache
        earlier = self._earlier.get(stage, CacheIndex(kept.rows[:, :0], None, 0))
        slots = earlier.extended(kept.rows, kept.valid, self.past, self.length)
        self.cache_state.hold(stage, slots, static_width(cache, index))
        if self.rules.positions == "compact":
            assert position_ids is not None
            # By how much the positions of tokens after this call are lowered.
            renumbered = self.inputs.renumbered(stage, kept, position_ids)[:, -1:]
            self.cache_state.shift[stage] = take_rows(position_ids, kept.rows[:, -1:], -1) - renumbered

    # ---- arguments of layers ---------------------------------------------------------------------------------------

    def _build(self, stage: int, index: int, hidden: Tensor, kwargs: Kwargs) -> Kwargs:
        source = self.info.sources[index]
        kept, slots = self._kept.get(stage), self._slots_of(stage, source)
        if slots is None:
            return {}
        written = self._kept.get(stage if source == index else self.rules.schedule.stage_of(source))
        added = self.length if written is None else written.rows.shape[1]
        if kept is not None and hidden.shape[-2] < kept.rows.shape[1]:
            kept = None  # the model itself has continued with the last rows only (Gemma 4) and cut its kwargs
        return self.inputs.build(stage, index, kept, slots, added, hidden, kwargs)

    def _own_slots(self, stage: int) -> CacheIndex | None:
        if self.cache_state is None:
            kept = self._kept.get(stage)
            return None if kept is None else CacheIndex(kept.rows, kept.valid, self.length)
        slots = self.cache_state.slots.get(stage)
        return slots and slots.resized(self.past + self.length)

    # ---- after the text model --------------------------------------------------------------------------------------

    def after_text(self, output: Any) -> Any:
        """Scatter rows back to their columns, as the caller expects; rows of dropped tokens are zero."""
        # A model that drafts for itself runs fewer layers.
        check_drops(self.info.text, self._missed(self.info.text.config.num_hidden_layers))
        if self._cache is not None and not ignores_cache(self.info.layers[0]):
            self._hand_over(self._cache)
        kept, last = self._kept.get(len(self._ranking.plan.drops)), output[0]
        if kept is None or last.shape[1] != kept.rows.shape[1]:
            return output
        if self.shift_labels is None or self._labels is None:
            last = scatter_rows(last, kept.rows, kept.valid, self.length)
        else:  # the remaining rows stay, with their labels beside them
            self.shift_labels.copy_(take_next_labels(self._labels, kept.rows, kept.valid))
        if isinstance(output, tuple):
            return (last, *output[1:])
        output.last_hidden_state = last
        if getattr(output, "hidden_states", None) is not None:  # the first one is the input of layer 0
            output.hidden_states = tuple(
                self._full_hidden(max(number - 1, 0), state) for number, state in enumerate(output.hidden_states)
            )
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(self._full_attention(*item) for item in enumerate(output.attentions))
        return output

    def _missed(self, index: int) -> list[int]:
        """The drop layers up to layer `index` at which no token was dropped although it should have been."""
        drops = enumerate(self._ranking.plan.drops)
        return [drop.layer for number, drop in drops if number + 1 not in self._kept and drop.layer < index]

    def _hand_over(self, cache: Any) -> None:
        """Attach the state to the cache, after all layers have written to it."""
        assert self.cache_state is not None
        stages = {index: self.rules.schedule.stage_of(index) for index in self.info.caching}
        check_lengths(cache, self.past + self.length, stages, self.cache_state)
        attach_state(cache, self.cache_state)
        let_crop_follow(cache, {index: self.cache_state.num_dropped(stage) for index, stage in stages.items()})

    def _full_hidden(self, index: int, hidden: Tensor | None) -> Tensor | None:
        """Scatter the output (B, N, D) of layer `index` to the full length."""
        kept = self._kept.get(self.rules.schedule.stage_of(index))
        if hidden is None or kept is None or hidden.shape[-2] != kept.rows.shape[1]:
            return hidden  # the text model's input has its full length, even after a drop before layer 0
        return scatter_rows(hidden, kept.rows, kept.valid, self.length)

    def _full_attention(self, index: int, weights: Tensor | None) -> Tensor | None:
        """Scatter attention weights (B, H, N, K) of layer `index` to (B, H, length, past + length)."""
        stage = self.rules.schedule.stage_of(index)
        kept, slots = self._kept.get(stage), self._slots_of(stage, index)
        if weights is None or kept is None or slots is None:
            return weights
        weights = scatter_rows(weights, kept.rows, kept.valid, self.length, dim=2)
        weights = weights[..., : slots.columns.shape[1]]  # a static cache is wider than its content
        return scatter_rows(weights, slots.columns, slots.valid, self.past + self.length, dim=3)
