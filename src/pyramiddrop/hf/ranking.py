"""Ranking: what the scorer is shown at a stage end."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pyramiddrop.hf.choosing import present
from pyramiddrop.hf.following import Following, Kwargs
from pyramiddrop.hf.memory import Slots
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
        rows, alive, visual = present(self.plan, kept)
        device = hidden.device
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
        evidence = Evidence(
            layer=self.plan.stages[stage - 1].layer,
            visual=visual.to(device),
            ordinal=self.plan.ordinal.gather(1, rows).to(device),
            groups=self.plan.groups.gather(1, rows).to(device),
            quota=self.plan.stages[stage - 1].quota.to(device),
            hidden=_first_stream(hidden),
            attention=asked.attention,
            keys=asked.keys,
            previous=None if previous is None else _first_stream(previous).to(device),
        )
        return self.scorer(evidence).to(rows.device)


def _first_stream(hidden: Tensor) -> Tensor:
    """(B, N, D): of models with several hidden streams (Gemma 3n), the one that their layers compute on."""
    return hidden if hidden.dim() == 3 else hidden[0]
