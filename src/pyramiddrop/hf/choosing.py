"""The rows that are there when tokens are ranked, and those that stay by their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.rows import Kept
from pyramiddrop.selection import compact, select


def present(plan: Plan, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) rows that `kept` leaves (None: all), which of them are no filler, and which are visual tokens."""
    if kept is not None:
        rows, valid = kept.rows, kept.valid
    else:
        rows, valid = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual), plan.valid
    alive = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
    return rows, alive, plan.visual.gather(1, rows) & alive


def choose(plan: Plan, stage: int, before: Kept | None, scores: Tensor) -> Kept:
    """The rows that the end of `stage` leaves of those `before` it, by their `scores` (B, N)."""
    ending = plan.stages[stage - 1]
    rows, alive, visual = present(plan, before)
    scores = scores.masked_fill(plan.protected.gather(1, rows), float("inf"))
    stays = select(scores, visual, plan.groups.gather(1, rows), ending.quota) | (alive & ~visual)
    local, valid = compact(stays, ending.length, ending.ragged)
    return Kept(rows.gather(1, local), local, valid)
