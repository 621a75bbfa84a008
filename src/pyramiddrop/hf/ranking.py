"""Ranking: what the scorer is shown at a stage end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyramiddrop.hf.choosing import present
from pyramiddrop.hf.compatibility import cache_unwritten, check_cache, check_per_token
from pyramiddrop.hf.following import Following, Kwargs
from pyramiddrop.hf.memory import Slots
from pyramiddrop.hf.packing import Packing, Unpacked
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.projections import Projector
from pyramiddrop.hf.ranking_layer import RankingLayer
from pyramiddrop.hf.rows import Kept
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import Evidence, Scorer


class Ranking:
    """Scores for one prefill.

    Args:
        plan: of the prefill.
        schedule: of the method.
        scorer: of the method.
        following: positions of the rows.
        earlier: stage -> what earlier calls left in the stage's cache.
        projector: gives the queries and keys.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        scorer: Scorer,
        following: Following,
        earlier: Mapping[int, Slots],
        projector: Projector,
    ) -> None:
        self.plan, self.schedule, self.scorer = plan, schedule, scorer
        self.following, self.earlier, self.projector = following, earlier, projector

    def score(
        self,
        stage: int,
        kept: Kept | None,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        previous: Tensor | None,
        kwargs: Kwargs,
    ) -> Tensor:
        """(B, N) scores for the end of `stage`, of the rows that `kept` leaves, on the device of the plan.

        Args:
            index: of the ranking layer.
            layer: the ranking layer.
            hidden: (B, N, D), what it receives.
            previous: (B, N, D), what the layer before it received, or None.
            kwargs: of the text model, for the full length.
        """
        check_cache(layer, kwargs)
        check_per_token(layer, kwargs, self.plan.length)
        plan = self.plan
        rows, alive, visual = present(plan, kept)
        documents = self._documents(stage, rows, alive)
        device = hidden.device
        asked = RankingLayer(
            plan,
            self.following,
            self.projector,
            self.schedule.stage_of(index),
            self.earlier,
            kept,
            (rows, alive),
            index,
            layer,
            hidden,
            kwargs,
            documents,
        )
        evidence = Evidence(
            layer=plan.stages[stage - 1].layer,
            visual=visual.to(device),
            ordinal=plan.ordinal.gather(1, rows).to(device),
            groups=plan.groups.gather(1, rows).to(device),
            quota=plan.stages[stage - 1].quota.to(device),
            hidden=_first_stream(hidden),
            attention=asked.attention,
            keys=asked.keys,
            previous=None if previous is None else _first_stream(previous).to(device),
        )
        with cache_unwritten(layer, index, kwargs):
            if plan.packing is None or documents is None:
                return self.scorer(evidence).to(rows.device)
            return documents.put(self.scorer(_by_document(evidence, plan.packing, documents))).to(rows.device)

    def _documents(self, stage: int, rows: Tensor, alive: Tensor) -> Unpacked | None:
        """The documents of packed rows in what is left when `stage` ends, or None where no row is packed."""
        packing, bounds = self.plan.packing, self.plan.bounds_in(stage - 1)
        if packing is None or bounds is None:
            return None
        numbers = packing.documents.gather(1, rows).masked_fill(~alive, packing.count)
        return Unpacked(numbers, packing.count, bounds.longest)


def _by_document(evidence: Evidence, packing: Packing, documents: Unpacked) -> Evidence:
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
