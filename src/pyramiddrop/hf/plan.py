"""The plan of one prefill: who is visual, who asks, and how many rows each stage leaves. Made once, on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.cost import Choice
from pyramiddrop.schedule import Schedule


@dataclass(frozen=True)
class Request:
    """What a call says about its B x L tokens. All tensors are on the CPU.

    Attributes:
        visual: (B, L) bool.
        queries: (B, L) bool, the tokens whose attention ranks; a sample without one drops nothing.
        instruction: (B, L) bool, the text from a sample's last visual token to its last query token.
        protected: (B, L) bool, tokens that are never dropped, for something is read off their rows.
        valid: (B, L) bool, False at padding, or None where there is none.
        groups: (B, L) long, the group of each visual token: those that share a quota.
        past: columns that the KV cache holds already.
    """

    visual: Tensor
    queries: Tensor
    instruction: Tensor
    protected: Tensor
    valid: Tensor | None
    groups: Tensor
    past: int


@dataclass(frozen=True)
class StagePlan:
    """One stage end of one prefill.

    Attributes:
        layer: drop before this 0-based layer.
        keep: keep ratio of the original count.
        quota: (B, G) long, visual tokens of each group that stay.
        length: rows of the rectangle that is left.
        ragged: whether some sample has fewer valid rows than `length`.
        drops: whether this stage drops anything that the one before had left.
    """

    layer: int
    keep: float
    quota: Tensor
    length: int
    ragged: bool
    drops: bool


@dataclass(frozen=True)
class Plan:
    """Masks and counts of one prefill of B x L tokens in G groups.

    Attributes:
        visual: (B, L) bool, valid visual tokens.
        protected: (B, L) bool, those of them that always stay.
        valid: (B, L) bool or None.
        ordinal: (B, L) long, the number of each visual token in its sample.
        groups: (B, L) long, the group of each visual token.
        queries: (B, Q) long, the columns of the query tokens, padded with repetitions.
        weights: (B, Q) float, 1 at a query token, 0 at padding.
        instruction, instruction_weights: the same of the instruction's tokens.
        stages: one entry a stage.
        past: columns before this call.
        reach: the columns from the first visual token to the last query token, in the sample where they are most.
    """

    visual: Tensor
    protected: Tensor
    valid: Tensor | None
    ordinal: Tensor
    groups: Tensor
    queries: Tensor
    weights: Tensor
    instruction: Tensor
    instruction_weights: Tensor
    stages: tuple[StagePlan, ...]
    past: int
    reach: int

    @property
    def length(self) -> int:
        return self.visual.shape[1]

    @property
    def choices(self) -> list[Choice]:
        """What the stage ends choose from, in the sample where that is most."""
        asking = self.queries.shape[1], self.instruction.shape[1]
        found, rows, before = [], self.length, int(self.visual.sum(1).max())
        for stage in self.stages:
            kept = int(stage.quota.sum(1).max())
            if stage.drops:
                found.append(Choice(stage.layer, rows, before, kept, *asking))
            rows, before = stage.length, kept
        return found

    @property
    def drops(self) -> bool:
        return any(stage.drops for stage in self.stages)

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        stages = tuple(replace(stage, quota=stage.quota.to(device)) for stage in self.stages)
        return replace(self, **moved, stages=stages)


def make_plan(request: Request, schedule: Schedule) -> Plan:
    """Work out the counts of every stage from the masks of `request`."""
    valid = request.valid
    visual = request.visual if valid is None else request.visual & valid
    queries = request.queries if valid is None else request.queries & valid
    groups = request.groups * visual
    num_groups = int(groups.max()) + 1
    protected = visual & (request.protected | queries)
    tokens, held = (_count(mask, groups, num_groups) for mask in (visual, protected))
    columns, weights = _query_columns(queries)
    instruction = request.instruction & ~visual
    asked = _query_columns(torch.where(instruction.any(1, keepdim=True), instruction, queries))
    return Plan(
        visual=visual,
        protected=protected,
        valid=valid,
        ordinal=(visual.long().cumsum(1) - 1).clamp(min=0),
        groups=groups,
        queries=columns,
        weights=weights,
        instruction=asked[0],
        instruction_weights=asked[1],
        stages=tuple(_stages(schedule, tokens, held, queries.any(1), _row_counts(visual, valid), visual.shape[1])),
        past=request.past,
        reach=_reach(visual, columns),
    )


def _reach(visual: Tensor, queries: Tensor) -> int:
    first = torch.where(visual.any(1), visual.long().argmax(1), visual.shape[1])
    return max(0, int((queries.max(1).values - first).max()) + 1)


def _stages(
    schedule: Schedule, tokens: Tensor, held: Tensor, asks: Tensor, rows: Tensor, length: int
) -> list[StagePlan]:
    """Counts of each stage: `tokens` (B, G) visual ones, `held` of them protected, in samples of `rows` (B,) rows."""
    plans = []
    before = tokens
    ragged = bool((rows != length).any())
    for stage in schedule.stages:
        counts = torch.tensor([[stage.count(n) for n in sample] for sample in tokens.tolist()]).view_as(tokens)
        quota = torch.where(asks[:, None], torch.maximum(counts, held), tokens)
        drops = bool((quota < before).any())
        if drops:
            left = rows - tokens.sum(1) + quota.sum(1)
            length = int(left.max())
            ragged = bool((left != length).any())
        plans.append(StagePlan(stage.layer, stage.keep, quota, length, ragged, drops))
        before = quota
    return plans


def _row_counts(visual: Tensor, valid: Tensor | None) -> Tensor:
    return torch.full((len(visual),), visual.shape[1]) if valid is None else valid.sum(1)


def _count(mask: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """(B, G) how many True each group has."""
    return torch.zeros(len(mask), num_groups, dtype=torch.long).scatter_add(1, groups, mask.long())


def _query_columns(queries: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q) columns of the query tokens and their weights; Q is the largest count, at least 1."""
    most = max(1, int(queries.sum(1).max()))
    columns = (~queries).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    return columns, queries.gather(1, columns).float()
