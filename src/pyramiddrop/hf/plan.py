"""The plan of one prefill: who is visual, who asks, and how many rows each stage leaves. Made once, on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.cost import Choice
from pyramiddrop.hf.packing import Bounds, Packing
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
        documents: (B, L) long, the document of each column counted along its row, or None where no row is packed.
        labels: (B, L) bool, the tokens that have a label, or None without labels.
        ignored: (B, L) bool, the tokens whose labels are not scored where tokens are dropped, or None where all are.
    """

    visual: Tensor
    queries: Tensor
    instruction: Tensor
    protected: Tensor
    valid: Tensor | None
    groups: Tensor
    past: int
    documents: Tensor | None = None
    labels: Tensor | None = None
    ignored: Tensor | None = None


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
        bounds: of the documents in what is left, or None where no row is packed.
    """

    layer: int
    keep: float
    quota: Tensor
    length: int
    ragged: bool
    drops: bool
    bounds: Bounds | None = None

    def to(self, device: torch.device) -> StagePlan:
        """The same with its tensors on `device`."""
        bounds = self.bounds and replace(self.bounds, cumulative=self.bounds.cumulative.to(device))
        return replace(self, quota=self.quota.to(device), bounds=bounds)


@dataclass(frozen=True)
class Plan:
    """Masks and counts of one prefill of B x L tokens in G groups.

    Attributes:
        visual: (B, L) bool, valid visual tokens.
        protected: (B, L) bool, those of them that always stay.
        valid: (B, L) bool or None.
        ordinal: (B, L) long, the number of each visual token in its sample, or in its document.
        groups: (B, L) long, the group of each visual token.
        queries: (B, Q) long, the columns of the query tokens, padded with repetitions.
        weights: (B, Q) float, 1 at a query token, 0 at padding.
        instruction, instruction_weights: the same of the instruction's tokens.
        stages: one entry a stage.
        past: columns before this call.
        reach: the columns from the first visual token to the last query token, in the sample where they are most.
        packing: the documents of packed rows, or None where no row is packed.
        bounds: of these documents in the whole rows.
        ignored: (B, L) bool, the tokens whose labels are not scored, or None where all are.
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
    packing: Packing | None = None
    bounds: Bounds | None = None
    ignored: Tensor | None = None

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

    def bounds_in(self, stage: int) -> Bounds | None:
        """Of the documents in the rows that have `stage` drops behind them; None where no row is packed."""
        return self.stages[stage - 1].bounds if stage else self.bounds

    @property
    def drops(self) -> bool:
        return any(stage.drops for stage in self.stages)

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        packing, stages = self.packing and self.packing.to(device), tuple(stage.to(device) for stage in self.stages)
        return replace(self, **moved, packing=packing, stages=stages)


def make_plan(request: Request, schedule: Schedule) -> Plan:
    """Work out the counts of every stage from the masks of `request`."""
    valid, documents = request.valid, request.documents
    visual = request.visual if valid is None else request.visual & valid
    queries = request.queries if valid is None else request.queries & valid
    groups = request.groups * visual
    num_groups = int(groups.max()) + 1
    protected = visual & (request.protected | queries)
    asked = last_column(queries, documents) >= 0
    tokens, held, asks = (_count(mask, groups, num_groups) for mask in (visual, protected, visual & asked))
    columns, weights = _query_columns(queries)
    instruction = request.instruction & ~visual
    instructed = last_column(instruction, documents) >= 0
    instruction = torch.where(instructed, instruction, queries)
    instruction_columns, instruction_weights = _query_columns(instruction)
    packing = None if documents is None else _packing(documents, valid, visual, groups, queries, instruction)
    rows = _row_counts(visual, valid)
    return Plan(
        visual=visual,
        protected=protected,
        valid=valid,
        ordinal=_ordinal(visual, documents),
        groups=groups,
        queries=columns,
        weights=weights,
        instruction=instruction_columns,
        instruction_weights=instruction_weights,
        stages=tuple(_stages(schedule, tokens, held, asks > 0, rows, visual.shape[1], packing)),
        past=request.past,
        reach=_reach(visual, queries, documents),
        packing=packing,
        bounds=None if packing is None else Bounds.of(packing.lengths),
        ignored=request.ignored,
    )


def last_column(mask: Tensor, documents: Tensor | None) -> Tensor:
    """(B, L) for each column the last True of `mask` in its row, or in its document of `documents`; -1 for none."""
    columns = torch.arange(mask.shape[1]).expand_as(mask).masked_fill(~mask, -1)
    if documents is None:
        return columns.max(1, keepdim=True).values.expand_as(columns)
    last = columns.new_full((len(mask), int(documents.max()) + 1), -1)
    return last.scatter_reduce(1, documents, columns, "amax").gather(1, documents)


def _reach(visual: Tensor, queries: Tensor, documents: Tensor | None) -> int:
    first = visual.shape[1] - 1 - last_column(visual.flip(1), None if documents is None else documents.flip(1)).flip(1)
    return max(0, int((last_column(queries, documents) - first).max()) + 1)


def _ordinal(visual: Tensor, documents: Tensor | None) -> Tensor:
    """(B, L) long, the number of each visual token in its document."""
    number = visual.long().cumsum(1) - 1
    if documents is not None:
        starts = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        before = number - visual.long() + 1  # visual tokens before each column
        number = number - torch.where(starts, before, 0).cummax(1).values
    return number.clamp(min=0)


def _packing(
    documents: Tensor, valid: Tensor | None, visual: Tensor, groups: Tensor, queries: Tensor, instruction: Tensor
) -> Packing:
    """The documents, numbered through the batch."""
    counts = documents.max(1).values + 1
    first, count = counts.cumsum(0) - counts, int(counts.sum())
    numbers = documents + first[:, None]
    if valid is not None:
        numbers = numbers.masked_fill(~valid, count)
    owners = torch.full((len(groups), int(groups.max()) + 1), count)
    row, column = visual.nonzero(as_tuple=True)
    owners[row, groups[row, column]] = numbers[row, column]
    lengths, asking, instructing = (
        torch.zeros(count + 1, dtype=torch.long).scatter_add(0, numbers.flatten(), mask.flatten().long())[:count]
        for mask in (torch.ones_like(visual), queries, instruction)
    )
    return Packing(
        documents=numbers,
        count=count,
        rows=torch.repeat_interleave(torch.arange(len(counts)), counts),
        owners=owners,
        lengths=lengths,
        queries=max(1, int(asking.max())),
        instruction=max(1, int(instructing.max())),
    )


def _stages(
    schedule: Schedule,
    tokens: Tensor,
    held: Tensor,
    asks: Tensor,
    rows: Tensor,
    length: int,
    packing: Packing | None,
) -> list[StagePlan]:
    """Counts of each stage: `tokens` (B, G) visual ones, `held` of them protected, in samples of `rows` (B,) rows."""
    plans = []
    before = tokens
    ragged = bool((rows != length).any())
    for stage in schedule.stages:
        counts = torch.tensor([[stage.count(n) for n in sample] for sample in tokens.tolist()]).view_as(tokens)
        quota = torch.where(asks, torch.maximum(counts, held), tokens)
        drops = bool((quota < before).any())
        if drops:
            left = rows - tokens.sum(1) + quota.sum(1)
            length = int(left.max())
            ragged = bool((left != length).any())
        bounds = None if packing is None else Bounds.of(packing.lengths - packing.per_document(tokens - quota))
        plans.append(StagePlan(stage.layer, stage.keep, quota, length, ragged, drops, bounds))
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
