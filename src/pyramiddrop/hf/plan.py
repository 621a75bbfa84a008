"""The rules of a method, and the plan of a prefill: the index tables of its tokens, and the counts of every drop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyramiddrop.cost import DropCounts, RankingCost
from pyramiddrop.hf.prompt_masks import Prompt, PromptMasks, last_column
from pyramiddrop.hf.rows import Bounds, Packing, map_tensors
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import AttentionScorer, Scorer


@dataclass(frozen=True)
class Rules:
    """The settings of a method that the adapter needs; `pyramiddrop.methods` documents them."""

    schedule: Schedule
    scorer: Scorer
    positions: str
    rank_layer: str
    grouping: str
    logits: str
    merge: bool
    ranking_flops: RankingCost

    @property
    def are_usual(self) -> bool:
        """True if a prefill whose last token is the query may use `LastTokenPlan`."""
        return type(self.scorer) is AttentionScorer and self.grouping == "sample" and not self.merge

    @property
    def ranking_layers(self) -> list[int]:
        """The layer that ranks for each drop; for a drop before the decoder, layer 0, whose input is read."""
        return [max(0, layer - (self.rank_layer == "last")) for layer in self.schedule.layers]


@dataclass(frozen=True)
class Drop:
    """One drop of one prefill.

    Attributes:
        kept: number of kept visual tokens in the sample that keeps most.
        length: padded number of rows after the drop.
        happens: True if it drops any token.
        ranks: True if it ranks; False if all visual tokens are dropped, or all but the protected ones.
    """

    layer: int
    keep: float
    kept: int
    length: int
    happens: bool
    ranks: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a prefill of B x L tokens, known on the host before it runs.

    Attributes:
        drops: shallow to deep. Stage k is the run of layers between drops k - 1 and k.
        past: number of columns before this call.
        visual_tokens: the largest number of visual tokens of a sample.
        num_queries: the largest numbers of query tokens and of instruction tokens of a sample.
        reach: the largest distance in columns from the first visual token to the last query token of a sample.
        bounds: for each stage the bounds of its documents; empty if no row is packed.
        ignored: (B, L) bool, the tokens whose labels are not scored; None if all are.
    """

    batch: int
    length: int
    drops: tuple[Drop, ...]
    past: int
    visual_tokens: int
    num_queries: tuple[int, int]
    reach: int
    bounds: tuple[Bounds, ...] = field(default=(), kw_only=True)
    ignored: Tensor | None = field(default=None, kw_only=True)

    @property
    def drop_counts(self) -> list[DropCounts]:
        """The token counts at each drop that ranks, in the sample with most tokens."""
        found, rows, before = [], self.length, self.visual_tokens
        for drop in self.drops:
            if drop.ranks:
                found.append(DropCounts(drop.layer, rows, before, drop.kept, *self.num_queries))
            rows, before = drop.length, drop.kept
        return found

    @property
    def drops_any(self) -> bool:
        """True if any token is dropped."""
        return any(drop.happens for drop in self.drops)

    @property
    def visual_rows(self) -> tuple[Tensor, Tensor | None]:
        """(B, n) columns of this call in ascending order, and which of them are visual tokens; None: all."""
        raise NotImplementedError

    @property
    def visual_columns(self) -> list[Tensor]:
        """For each sample, the sorted columns of its visual tokens."""
        rows, visual = self.visual_rows
        return list(rows) if visual is None else [row[mask] for row, mask in zip(rows, visual, strict=True)]

    def document_bounds(self, stage: int) -> Bounds | None:
        """The bounds of the documents in the rows of `stage`; None if no row is packed."""
        return self.bounds[stage] if self.bounds else None

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class LastTokenPlan(Plan):
    """The plan of the usual prefill: equally many visual tokens in all samples, whose last tokens are the queries.

    There is no padding, no protected token, and one quota for a sample. A drop is then a sort of the scores and a sort
    of the kept columns; `tests/test_last_token.py` compares it with `GeneralPlan`.

    Attributes:
        columns: (B, L) long, for each sample the columns of text, then those of visual tokens, both ascending.
    """

    columns: Tensor

    @property
    def text(self) -> Tensor:
        """(B, L - V) long, the columns of text."""
        return self.columns[:, : self.length - self.visual_tokens]

    @property
    def visual(self) -> Tensor:
        """(B, V) long, the columns of visual tokens."""
        return self.columns[:, self.length - self.visual_tokens :]

    @property
    def visual_rows(self) -> tuple[Tensor, None]:
        return self.visual, None

    def to(self, device: torch.device) -> LastTokenPlan:
        return replace(self, columns=self.columns.to(device))


def plan_last_token(prompt: Prompt, schedule: Schedule) -> LastTokenPlan | None:
    """Plan a usual prefill with few operations; None if this one is not usual."""
    batch, length = prompt.shape
    counts = prompt.visual.sum(1).tolist()
    if not prompt.last_token_asks or len(set(counts)) != 1 or not counts[0]:
        return None
    visual = counts[0]
    columns = prompt.visual.to(torch.uint8).sort(dim=1, stable=True).indices
    if length - 1 in columns[:, -1].tolist():
        return None  # the last token is itself visual
    drops, before = [], visual
    for stage in schedule.stages:
        kept = stage.count(visual)
        drops.append(Drop(stage.layer, stage.keep, kept, length - visual + kept, kept < before, 0 < kept < before))
        before = kept
    reach = length - min(columns[:, length - visual].tolist())
    instruction = length - 1 - min(columns[:, -1].tolist())
    return LastTokenPlan(batch, length, tuple(drops), 0, visual, (1, instruction), reach, columns)


@dataclass(frozen=True)
class GeneralPlan(Plan):
    """The plan of any prefill: padding, several queries, protected tokens, groups, packed rows.

    Attributes:
        visual, valid, groups: see `PromptMasks`.
        protected: (B, L) bool, visual tokens that are never dropped.
        token_index: (B, L) long, the number of each visual token in its sample, or in its document.
        queries: (B, Q) long, the columns of the query tokens, padded with repetitions.
        weights: (B, Q) float, 1 at a query token, 0 at padding.
        instruction, instruction_weights: the same for instruction tokens.
        num_keeps: for each drop (B, G) long, the number of kept visual tokens of each group.
        ragged: for each drop, True if some sample has padding after it.
        packing: the documents of packed rows; None if no row is packed.
    """

    visual: Tensor
    protected: Tensor
    valid: Tensor | None
    token_index: Tensor
    groups: Tensor
    queries: Tensor
    weights: Tensor
    instruction: Tensor
    instruction_weights: Tensor
    num_keeps: tuple[Tensor, ...]
    ragged: tuple[bool, ...]
    packing: Packing | None = None

    @property
    def visual_rows(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.length, device=self.visual.device).expand_as(self.visual), self.visual


def make_plan(masks: PromptMasks, schedule: Schedule) -> GeneralPlan:
    """Compute the index tables and the counts of every drop from the masks of a prefill."""
    visual, valid, documents, queries, groups = masks.visual, masks.valid, masks.documents, masks.queries, masks.groups
    batch, length = visual.shape
    num_groups = int(groups.max()) + 1
    protected = visual & masks.protected
    asked = last_column(queries, documents) >= 0
    tokens, held, asks = (
        torch.zeros(batch, num_groups, dtype=torch.long).scatter_add(1, groups, mask.long())
        for mask in (visual, protected, visual & asked)
    )
    columns, weights = _query_columns(queries)
    instructed = last_column(masks.instruction, documents) >= 0
    instruction = torch.where(instructed, masks.instruction, queries)
    instruction_columns, instruction_weights = _query_columns(instruction)
    packing = None if documents is None else _packing(documents, valid, visual, groups, queries, instruction)
    rows = torch.full((batch,), length) if valid is None else valid.sum(1)
    drops, num_keeps, ragged = _drops(schedule, tokens, held, asks > 0, rows, length)
    return GeneralPlan(
        batch=batch,
        length=length,
        drops=tuple(drops),
        past=masks.past,
        visual_tokens=int(tokens.sum(1).max()),
        num_queries=(columns.shape[1], instruction_columns.shape[1]),
        reach=_reach(visual, queries, documents),
        visual=visual,
        protected=protected,
        valid=valid,
        token_index=_token_index(visual, documents),
        groups=groups,
        queries=columns,
        weights=weights,
        instruction=instruction_columns,
        instruction_weights=instruction_weights,
        num_keeps=tuple(num_keeps),
        ragged=tuple(ragged),
        packing=packing,
        bounds=() if packing is None else tuple(packing.bounds(tokens - kept) for kept in (tokens, *num_keeps)),
        ignored=masks.ignored,
    )


def _reach(visual: Tensor, queries: Tensor, documents: Tensor | None) -> int:
    first = visual.shape[1] - 1 - last_column(visual.flip(1), None if documents is None else documents.flip(1)).flip(1)
    return max(0, int((last_column(queries, documents) - first).max()) + 1)


def _token_index(visual: Tensor, documents: Tensor | None) -> Tensor:
    """(B, L) long, the number of each visual token in its document."""
    number = visual.long().cumsum(1) - 1
    if documents is not None:
        starts = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        before = number - visual.long() + 1  # number of visual tokens before each column
        number = number - torch.where(starts, before, 0).cummax(1).values
    return number.clamp(min=0)


def _packing(
    documents: Tensor, valid: Tensor | None, visual: Tensor, groups: Tensor, queries: Tensor, instruction: Tensor
) -> Packing:
    """The documents of packed rows, numbered through the batch."""
    counts = documents.max(1).values + 1
    first, count = counts.cumsum(0) - counts, int(counts.sum())
    numbers = documents + first[:, None]
    if valid is not None:
        numbers = numbers.masked_fill(~valid, count)
    owners = torch.full((len(groups), int(groups.max()) + 1), count)
    row, column = visual.nonzero(as_tuple=True)
    owners[row, groups[row, column]] = numbers[row, column]
    lengths, num_queries, num_instruction = (
        torch.zeros(count + 1, dtype=torch.long).scatter_add(0, numbers.flatten(), mask.flatten().long())[:count]
        for mask in (torch.ones_like(visual), queries, instruction)
    )
    return Packing(
        documents=numbers,
        count=count,
        rows=torch.repeat_interleave(torch.arange(len(counts)), counts),
        owners=owners,
        lengths=lengths,
        queries=max(1, int(num_queries.max())),
        instruction=max(1, int(num_instruction.max())),
    )


def _drops(
    schedule: Schedule, tokens: Tensor, held: Tensor, asks: Tensor, rows: Tensor, length: int
) -> tuple[list[Drop], list[Tensor], list[bool]]:
    """The drops in samples with `rows` (B,) rows, padded to `length`.

    Args:
        tokens, held: (B, G) long, the number of visual tokens of each group, and of protected ones among them.
        asks: (B, G) bool, False at groups without a query, which keep all of their tokens.

    Returns:
        the drops; for each, (B, G) the number of kept tokens, and whether some sample has padding after it.
    """
    drops, num_keeps, ragged, before, left = [], list[Tensor](), [], tokens, rows
    for stage in schedule.stages:
        counts = torch.tensor([[stage.count(n) for n in sample] for sample in tokens.tolist()]).view_as(tokens)
        num_keep = torch.where(asks, torch.maximum(counts, held), tokens)
        happens = bool((num_keep < before).any())
        if happens:
            left = rows - tokens.sum(1) + num_keep.sum(1)
            length = int(left.max())
        ragged.append(bool((left != length).any()))
        ranks = bool(((held < num_keep) & (num_keep < before)).any())
        drops.append(Drop(stage.layer, stage.keep, int(num_keep.sum(1).max()), length, happens, ranks))
        num_keeps.append(before := num_keep)
    return drops, num_keeps, ragged


def _query_columns(queries: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q) columns of the query tokens and their weights; Q is the largest count, at least 1."""
    most = max(1, int(queries.sum(1).max()))
    columns = (~queries).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    return columns, queries.gather(1, columns).float()
