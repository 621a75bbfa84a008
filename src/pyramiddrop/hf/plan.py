"""Extract the visual, query and protected tokens from a forward call, and plan the rows that each stage keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.cost import Choice
from pyramiddrop.hf.images import counted_along, frames_of_beams, group_tokens, video_frames, video_lengths
from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.hf.packing import Bounds, Packing, find_documents
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
        """Columns of the batch."""
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
        """Whether any stage drops a token."""
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


IGNORED_LABEL = -100
_ANSWERS = (
    "Supervise the answers alone (with TRL: prompt and completion, or assistant_only_loss=True), or give query_mask"
)


@dataclass(frozen=True)
class GivenMasks:
    """Masks that the user gave: (B, L) bool on the CPU, or None.

    Raises:
        ValueError: where one is no two-dimensional bool tensor, or their shapes differ.
    """

    visual: Tensor | None = None
    query: Tensor | None = None

    def __post_init__(self) -> None:
        for name, mask in (("visual_mask", self.visual), ("query_mask", self.query)):
            if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2):
                got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"{name} must be a bool tensor of shape (batch, length); got {got}")
        if self.visual is not None and self.query is not None and self.visual.shape != self.query.shape:
            raise ValueError(
                f"visual_mask and query_mask must have the same shape; got {tuple(self.visual.shape)} and "
                f"{tuple(self.query.shape)}"
            )


def call_shape(call: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, L) of the call's tokens, or None where it has none."""
    for name in ("input_ids", "inputs_embeds"):
        if call.get(name) is not None:
            return tuple(call[name].shape[:2])
    return None


def read_request(
    call: Mapping[str, Any],
    anatomy: ModelInfo,
    given: GivenMasks,
    past: int,
    training: bool,
    guesses: int,
    grouping: str,
    given_frames: Sequence[int] | None = None,
    beams: int = 1,
    may_be_packed: bool = True,
) -> Request:
    """The request of a prefill.

    Args:
        call: arguments of the model's forward.
        anatomy: of the model.
        given: masks that the user gave.
        past: columns in the KV cache.
        training: whether this is a training forward: then only labels (or a query mask) say who asks.
        guesses: columns at the end that are no prompt: candidates of assisted decoding.
        grouping: "sample", "image" or "frame": which visual tokens share a quota.
        given_frames: of each video that `generate` was given; its forwards are not told.
        beams: how often `generate` has repeated each row.
        may_be_packed: whether a row may hold several documents; those of `generate` never do.

    Raises:
        ValueError: for embeddings without a visual mask, for masks that do not fit the call, and for packed rows that
            cannot be followed.
    """
    shape = call_shape(call)
    assert shape is not None
    visual = _fitted(given.visual, "visual_mask", shape, past)
    if visual is None:
        visual = _visual_from_ids(call, anatomy)
    prompt = torch.arange(shape[1]) < shape[1] - guesses
    visual = visual & prompt
    valid = _valid(call.get("attention_mask"), shape, past)
    documents = find_documents(call, shape, valid, past) if may_be_packed else None
    labels = _supervised(call)
    query = _fitted(given.query, "query_mask", shape, past)
    protected, ignored = torch.zeros_like(visual), None
    if labels is not None:
        answer = labels & ~visual if valid is None else labels & ~visual & valid
        protected[:, :-1] = answer[:, 1:]
        ignored = _ignored(labels, visual & ~protected, visual, valid)
        if query is None:
            query = protected & ~answer & ~_ends(documents, shape)
    elif query is None and training:
        query = protected
    elif query is None:
        prompt = prompt.expand(shape) if valid is None else valid & prompt
        query = prompt & (torch.arange(shape[1]) == last_column(prompt, documents))
    groups = _groups(call, anatomy, grouping, visual, given_frames, beams)
    if documents is not None:
        groups = counted_along(groups + documents * shape[1], visual)
    text = ~visual if valid is None else ~visual & valid
    if labels is not None:
        text = text & ~labels
    instruction = _instruction(visual, query, text, documents)
    return Request(visual, query, instruction, protected | query, valid, groups, past, documents, labels, ignored)


def _supervised(call: Mapping[str, Any]) -> Tensor | None:
    """(B, L) bool, the tokens with a label; None without labels, and where they are not those of tokens."""
    labels = call.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != call_shape(call):
        return None
    supervised: Tensor = labels.cpu() != IGNORED_LABEL
    return supervised


def _ignored(labels: Tensor, droppable: Tensor, visual: Tensor, valid: Tensor | None) -> Tensor | None:
    """(B, L) the supervised tokens whose label says nothing of an answer: visual ones, and those that padding or a
    `droppable` visual token would have to predict. None where there are none."""
    blind = droppable if valid is None else droppable | ~valid
    ignored = labels & (visual | torch.nn.functional.pad(blind, (1, 0))[:, :-1])
    return ignored if bool(ignored.any()) else None


def _ends(documents: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """(B, L) True at the last token of each document but a row's last."""
    if documents is None:
        return torch.zeros(shape, dtype=torch.bool)
    return torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (0, 1))


def remark(request: Request, plan: Plan, query_given: bool) -> str | None:
    """What the user of a training or evaluation loop may not have meant, and what to do; None where all is well.

    Args:
        query_given: whether a query_mask says who asks, and not the labels.
    """
    if not plan.drops:
        return f"drops nothing in this forward: {_why_nothing(request, query_given)}"
    if request.labels is None or query_given:
        return None
    asked, asked_by_text = (
        last_column(queries, request.documents) >= 0 for queries in (request.queries, request.queries & ~request.visual)
    )
    if bool((plan.visual & asked & ~asked_by_text).any()):
        return (
            "ranks by visual tokens in this forward, which have not read the question: the text behind an image is "
            f"supervised from its first token on, and the token before it asks. {_ANSWERS}. Labels of visual tokens "
            "are ignored"
        )
    if request.ignored is not None and bool((request.ignored & request.visual).any()):
        return "ignores labels of visual tokens, for it drops such tokens: set them to -100"
    return None


def _why_nothing(request: Request, query_given: bool) -> str:
    if request.queries.any():
        return "the samples that ask have so few visual tokens that the schedule keeps them all"
    if query_given:
        return "query_mask marks no token"
    if request.labels is None:
        return "it has no labels, so no token asks. Pass labels to the model, or give query_mask, or call model.eval()"
    if not request.protected.any():
        return (
            "no label of its text is supervised, so no token asks. Give the answers their token ids as labels, and all "
            "other tokens -100"
        )
    return f"its text is supervised from the first token on, so no token stands before an answer and asks. {_ANSWERS}"


def extend_request(prompt: Request, call: Mapping[str, Any]) -> Request:
    """The prompt's request for a later, uncached step of its generation: new tokens are not visual and do not ask."""
    shape = call_shape(call)
    assert shape is not None
    new = shape[1] - prompt.visual.shape[1]
    names = ("visual", "queries", "instruction", "protected", "groups")
    extended: dict[str, Any] = {name: torch.nn.functional.pad(getattr(prompt, name), (0, new)) for name in names}
    return replace(prompt, **extended, valid=_valid(call.get("attention_mask"), shape, prompt.past))


def _visual_from_ids(call: Mapping[str, Any], anatomy: ModelInfo) -> Tensor:
    ids, types = call.get("input_ids"), call.get("mm_token_type_ids")
    if ids is not None and anatomy.visual_ids:
        return _among(ids, anatomy.visual_ids)
    if types is not None and types.shape == call_shape(call):
        typed: Tensor = types.cpu() > 0
        return typed
    raise ValueError(
        "visual_mask is needed: this call has no ids of visual tokens (inputs_embeds, or a text model). Give a "
        "(batch, length) bool mask: with method(model, visual_mask=mask)"
    )


def _among(ids: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return torch.isin(ids.cpu(), torch.tensor(numbers))


def _groups(
    call: Mapping[str, Any],
    anatomy: ModelInfo,
    grouping: str,
    visual: Tensor,
    given_frames: Sequence[int] | None,
    beams: int,
) -> Tensor:
    if grouping == "sample":
        return torch.zeros_like(visual, dtype=torch.long)
    ids = call.get("input_ids")
    video = torch.zeros_like(visual) if ids is None else _among(ids, anatomy.video_ids) & visual
    lengths = anatomy.image_lengths(call, visual & ~video)
    frames = video_frames(call, anatomy.merged_frames)
    if frames is None and given_frames is not None:
        frames = frames_of_beams(given_frames, video, beams)
    return group_tokens(grouping, visual, video, lengths, frames, video_lengths(call))


def _fitted(mask: Tensor | None, name: str, shape: tuple[int, int], past: int) -> Tensor | None:
    """The user's mask for this call: of the call's shape, or of all columns so far; repeated for beams."""
    if mask is None:
        return None
    batch, length = shape
    if mask.shape[1] == past + length:
        mask = mask[:, past:]
    if mask.shape[1] != length or batch % len(mask):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but this call has {batch} x {length} tokens")
    return mask.cpu().repeat_interleave(batch // len(mask), 0)


def _valid(mask: Any, shape: tuple[int, int], past: int) -> Tensor | None:
    """(B, L) bool, False at padding, from a 2-D mask or from the diagonal of a prepared 4-D one; None: no padding."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.dim() == 4:
        own = mask[..., past : past + shape[1]].diagonal(dim1=-2, dim2=-1)[:, 0]
        mask = own if own.dtype == torch.bool else own >= 0
    valid = mask[:, -shape[1] :].bool().cpu().expand(shape)
    return None if bool(valid.all()) else valid


def _instruction(visual: Tensor, query: Tensor, text: Tensor, documents: Tensor | None) -> Tensor:
    """(B, L) the `text` behind each sample's last visual token, up to its last query token."""
    columns = torch.arange(visual.shape[1]).expand_as(visual)
    return text & (columns > last_column(visual, documents)) & (columns <= last_column(query, documents))
