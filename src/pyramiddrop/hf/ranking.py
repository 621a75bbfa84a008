"""Ranking and choosing: what the scorer is shown at a stage end, and the rows that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyramiddrop.hf.following import Following, Kwargs
from pyramiddrop.hf.memory import Slots
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.projections import Projector
from pyramiddrop.hf.ranking_layer import RankingLayer
from pyramiddrop.hf.rows import Kept
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import Evidence, Scorer
from pyramiddrop.selection import compact, select


class Ranking:
    """Decides for one prefill.

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

    def present(self, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N) rows that `kept` leaves (None: all), which of them are no filler, and which are visual tokens."""
        plan = self.plan
        if kept is not None:
            rows, valid = kept.rows, kept.valid
        else:
            rows, valid = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual), plan.valid
        alive = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
        return rows, alive, plan.visual.gather(1, rows) & alive

    def choose(self, stage: int, before: Kept | None, scores: Tensor) -> Kept:
        """The rows that the end of `stage` leaves of those `before` it, by their `scores` (B, N)."""
        ending = self.plan.stages[stage - 1]
        rows, alive, visual = self.present(before)
        scores = scores.masked_fill(self.plan.protected.gather(1, rows), float("inf"))
        stays = select(scores, visual, self.plan.groups.gather(1, rows), ending.quota) | (alive & ~visual)
        local, valid = compact(stays, ending.length, ending.ragged)
        return Kept(rows.gather(1, local), local, valid)

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
        """(B, N) scores for the end of `stage`, of the rows that `kept` leaves.

        Args:
            index: of the ranking layer.
            layer: the ranking layer.
            hidden: (B, N, D), what it receives.
            previous: (B, N, D), what the layer before it received, or None.
            kwargs: of the text model, for the full length.
        """
        rows, alive, visual = self.present(kept)
        asked = RankingLayer(
            self.plan,
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
        )
        return self.scorer(
            Evidence(
                layer=self.plan.stages[stage - 1].layer,
                visual=visual,
                ordinal=self.plan.ordinal.gather(1, rows),
                groups=self.plan.groups.gather(1, rows),
                quota=self.plan.stages[stage - 1].quota,
                hidden=_first_stream(hidden),
                attention=asked.attention,
                keys=asked.keys,
                previous=None if previous is None else _first_stream(previous),
            )
        )


def _first_stream(hidden: Tensor) -> Tensor:
    """(B, N, D): of models with several hidden streams (Gemma 3n), the one that their layers compute on."""
    return hidden if hidden.dim() == 3 else hidden[0]
