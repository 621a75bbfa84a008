"""What a call says about its tokens: who is visual, who asks, who must stay. Read once, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.anatomy import Anatomy
from pyramiddrop.hf.groups import counted_along, frames_of_beams, group_tokens, video_frames, video_lengths
from pyramiddrop.hf.packing import find_documents
from pyramiddrop.hf.plan import Plan, Request, last_column

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
    anatomy: Anatomy,
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


def _visual_from_ids(call: Mapping[str, Any], anatomy: Anatomy) -> Tensor:
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
    anatomy: Anatomy,
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
