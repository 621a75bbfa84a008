"""Rank the visual tokens at a drop by the ranking layer, and select the rows that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyramiddrop.hf.cache_state import CacheIndex
from pyramiddrop.hf.compatibility import cache_unwritten, check_cache, check_per_token
from pyramiddrop.hf.layer_inputs import LayerCall, LayerInputs
from pyramiddrop.hf.plan import GeneralPlan, LastTokenPlan, Plan
from pyramiddrop.hf.query_key import QueryKey, extract
from pyramiddrop.hf.ranking_layer import RankingLayer, kernel_arguments
from pyramiddrop.hf.rows import Packing, Selection, Unpacked
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import Scorer, ScorerInputs
from pyramiddrop.scoring.attention import attention_received
from pyramiddrop.selection import best, compact, select
from pyramiddrop.trace import Ranked, Trace


class Ranking:
    """The decisions of one prefill: scores at each drop, the rows that stay, and what the trace is told of them.

    Attributes:
        plan: of the prefill.
    """

    plan: Plan

    def score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        """(B, n) scores for `drop`, on the device of the plan.

        Args:
            kept: the rows that are left before the drop; None for all.
            call: of the ranking layer.
            previous: (B, N, D), what the layer before it received, or None.
        """
        check_cache(call.layer, call.kwargs)
        check_per_token(call.layer, call.kwargs, self.plan.length)
        with cache_unwritten(call.layer, call.index, call.kwargs):
            return self._score(drop, kept, call, previous).to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the plan's tensors."""
        raise NotImplementedError

    def move(self, device: torch.device) -> None:
        """Decide on another device from now on."""
        if self.device != device:
            self.plan = self.plan.to(device)

    def choose(self, drop: int, before: Selection | None, scores: Tensor) -> Selection:
        """The rows that `drop` leaves of those `before` it, by what `score` gave."""
        raise NotImplementedError

    def record(
        self, trace: Trace, drop: int, before: Selection | None, kept: Selection | None, scores: Tensor | None
    ) -> None:
        """Tell the trace of a drop; `scores` is None if it did not happen."""
        raise NotImplementedError

    def _score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        raise NotImplementedError


class LastTokenRanking(Ranking):
    """The usual prefill, scored by attention: the last row asks, and sees every row.

    Args:
        plan: of the prefill.
        inputs: positions of the rows.
    """

    def __init__(self, plan: LastTokenPlan, inputs: LayerInputs) -> None:
        self.plan: LastTokenPlan = plan
        self.inputs = inputs
        self._left: dict[int, Tensor] = {}  # stage -> (B, V) the columns that the drop before it has chosen

    @property
    def device(self) -> torch.device:
        return self.plan.columns.device

    def visual(self, stage: int) -> Tensor:
        """(B, V) ascending, the columns of the visual tokens of `stage`."""
        chosen = max((number for number in self._left if number <= stage), default=None)
        return self.plan.visual if chosen is None else self._left[chosen]

    def _score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        tokens = self.inputs.tokens(drop, kept, call.hidden, call.kwargs)
        seen: QueryKey = extract(call.layer, call.hidden, None, kernel_arguments(tokens, call.kwargs))
        scores = attention_received(seen.queries, seen.keys, None, None, seen.scale, seen.softcap, seen.sinks)
        columns = self.visual(drop)
        rows = columns if kept is None else torch.searchsorted(kept.rows, columns)
        return scores.gather(1, rows.to(scores.device))

    def choose(self, drop: int, before: Selection | None, scores: Tensor) -> Selection:
        columns = self.visual(drop).gather(1, best(scores, self.plan.drops[drop].kept)).sort().values
        self._left[drop + 1] = columns
        rows = torch.cat([self.plan.text, columns], 1).sort().values
        return Selection(rows, rows if before is None else torch.searchsorted(before.rows, rows), None)

    def record(
        self, trace: Trace, drop: int, before: Selection | None, kept: Selection | None, scores: Tensor | None
    ) -> None:
        ranked = None if scores is None else Ranked(self.visual(drop), None, scores)
        planned = self.plan.drops[drop]
        trace.record(planned.layer, planned.keep, self.visual(drop + 1), None, 0, ranked)


class GeneralRanking(Ranking):
    """Any prefill, any scorer.

    Args:
        plan: of the prefill.
        schedule: of the method.
        scorer: of the method.
        inputs: positions of the rows.
        earlier: stage -> what earlier calls left in the stage's cache.
    """

    def __init__(
        self,
        plan: GeneralPlan,
        schedule: Schedule,
        scorer: Scorer,
        inputs: LayerInputs,
        earlier: Mapping[int, CacheIndex],
    ) -> None:
        self.plan: GeneralPlan = plan
        self.schedule, self.scorer, self.inputs, self.earlier = schedule, scorer, inputs, earlier
        self._active: dict[Selection | None, ActiveRows] = {}

    @property
    def device(self) -> torch.device:
        return self.plan.visual.device

    def _score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        plan = self.plan
        rows, alive, visual = self.active_rows(kept)
        documents = self._documents(drop, rows, alive)
        device, stage = call.hidden.device, self.schedule.stage_of(call.index)
        ranking_layer = RankingLayer(plan, self.inputs, stage, self.earlier, kept, rows, alive, call, documents)
        evidence = ScorerInputs(
            layer=plan.drops[drop].layer,
            visual=visual.to(device),
            ordinal=plan.ordinal.gather(1, rows).to(device),
            groups=plan.groups.gather(1, rows).to(device),
            quota=plan.quotas[drop].to(device),
            hidden=_first_stream(call.hidden),
            attention=ranking_layer.attention,
            keys=ranking_layer.keys,
            previous=None if previous is None else _first_stream(previous).to(device),
        )
        if plan.packing is None or documents is None:
            return self.scorer(evidence)
        return documents.put(self.scorer(_by_document(evidence, plan.packing, documents)))

    def _documents(self, stage: int, rows: Tensor, alive: Tensor) -> Unpacked | None:
        """The documents of packed rows in the rows of `stage`, or None if no row is packed."""
        packing, bounds = self.plan.packing, self.plan.document_bounds(stage)
        if packing is None or bounds is None:
            return None
        numbers = packing.documents.gather(1, rows).masked_fill(~alive, packing.count)
        return Unpacked(numbers, packing.count, bounds.longest)

    def choose(self, drop: int, before: Selection | None, scores: Tensor) -> Selection:
        return select_rows(self.plan, drop, self.active_rows(before), scores)

    def active_rows(self, kept: Selection | None) -> ActiveRows:
        """`active_rows` of the plan, found once."""
        if kept not in self._active:
            self._active[kept] = active_rows(self.plan, kept)
        return self._active[kept]

    def record(
        self, trace: Trace, drop: int, before: Selection | None, kept: Selection | None, scores: Tensor | None
    ) -> None:
        ranked = None
        if scores is not None:
            there, _, candidates = self.active_rows(before)
            ranked = Ranked(there, candidates, scores)
        rows, _, visual = self.active_rows(kept)
        planned = self.plan.drops[drop]
        trace.record(planned.layer, planned.keep, rows, visual, self.plan.past, ranked)


def _by_document(evidence: ScorerInputs, packing: Packing, documents: Unpacked) -> ScorerInputs:
    """What a scorer is shown of packed rows: each document as a row of a batch."""
    own = packing.owners[packing.rows] == torch.arange(packing.count, device=packing.rows.device)[:, None]
    own, valid = own.to(evidence.visual.device), documents.valid.to(evidence.visual.device)
    previous = evidence.previous
    return replace(
        evidence,
        visual=documents.take(evidence.visual) & valid,
        ordinal=documents.take(evidence.ordinal),
        groups=documents.take(evidence.groups),
        quota=evidence.quota[packing.rows.to(own.device)] * own,
        hidden=documents.take(evidence.hidden),
        previous=None if previous is None else documents.take(previous),
    )


def _first_stream(hidden: Tensor) -> Tensor:
    """(B, N, D): of models with several hidden streams (Gemma 3n), the one that their layers compute on."""
    return hidden if hidden.dim() == 3 else hidden[0]


ActiveRows = tuple[Tensor, Tensor, Tensor]


def active_rows(plan: GeneralPlan, kept: Selection | None) -> ActiveRows:
    """(B, N) rows that `kept` leaves (None: all), which of them are no padding, and which are visual tokens."""
    if kept is not None:
        rows, valid = kept.rows, kept.valid
    else:
        rows, valid = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual), plan.valid
    alive = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
    return rows, alive, plan.visual.gather(1, rows) & alive


def select_rows(plan: GeneralPlan, drop: int, before: ActiveRows, scores: Tensor) -> Selection:
    """The rows that `drop` leaves of the active ones `before` it, by their `scores` (B, N)."""
    rows, alive, visual = before
    scores = scores.masked_fill(plan.protected.gather(1, rows), float("inf"))
    stays = select(scores, visual, plan.groups.gather(1, rows), plan.quotas[drop]) | (alive & ~visual)
    index, valid = compact(stays, plan.drops[drop].length, plan.ragged[drop])
    return Selection(rows.gather(1, index), index, valid)
