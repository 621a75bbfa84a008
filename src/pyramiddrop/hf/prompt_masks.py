"""Extract the visual, query and protected token masks from the arguments of a forward call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramiddrop.hf.images import counted_along, encoded_lengths, frames_of_beams, group_tokens, video_frames
from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.hf.rows import find_documents

IGNORED_LABEL = -100


@dataclass(frozen=True)
class GivenMasks:
    """The user's masks: (B, L) bool, or None."""

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
    """The shape (B, L) of the call's tokens; None if it has none."""
    for name in ("input_ids", "inputs_embeds"):
        if call.get(name) is not None:
            return tuple(call[name].shape[:2])
    return None


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prefill, as its call describes them. All tensors are on the CPU.

    Attributes:
        past: number of columns in the KV cache before this call.
        visual: (B, L) bool, the visual tokens, including any at padding.
        valid: (B, L) bool, False at padding; None if there is none.
        documents: (B, L) long, the document of each column counted along its row; None if no row is packed.
        labels: (B, L) bool, the tokens that have a label; None without labels.
        query: (B, L) bool, the user's query tokens; None if the user gave none.
        candidates: number of columns at the end that are candidate tokens of assisted decoding, not prompt.
    """

    call: Mapping[str, Any]
    shape: tuple[int, int]
    past: int
    visual: Tensor
    valid: Tensor | None
    documents: Tensor | None
    labels: Tensor | None
    query: Tensor | None
    candidates: int

    @property
    def last_token_asks(self) -> bool:
        """True if each sample is a whole prompt and its last column the query: no padding, labels, packing or cache."""
        told = (self.valid, self.documents, self.labels, self.query)
        return not self.past and not self.candidates and all(mask is None for mask in told)


@dataclass(frozen=True)
class PromptMasks:
    """Which of a prefill's B x L tokens are visual, query or protected tokens. All tensors are on the CPU.

    Attributes:
        queries: (B, L) bool, the tokens whose attention ranks; a sample without one drops nothing.
        instruction: (B, L) bool, the text from a sample's last visual token to its last query token.
        protected: (B, L) bool, tokens that are never dropped, because their rows are needed.
        valid: (B, L) bool, False at padding, where the other masks are False too; None if there is none.
        groups: (B, L) long, the group of each visual token, which shares a quota.
        past, documents, labels: see `Prompt`.
        ignored: (B, L) bool, the tokens whose labels are not scored if tokens are dropped; None if all are.
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


def read_prompt(
    call: Mapping[str, Any],
    shape: tuple[int, int],
    info: ModelInfo,
    given: GivenMasks,
    past: int,
    candidates: int = 0,
    may_be_packed: bool = True,
) -> Prompt:
    """Read the tokens of a prefill.

    Args:
        past: number of columns in the KV cache before this call.
        candidates: number of columns at the end that are not prompt.
        may_be_packed: True if a row may hold several documents; those of `generate` never do.
    """
    visual = _fitted(given.visual, "visual_mask", shape, past)
    if visual is None:
        visual = _visual_from_ids(call, shape, info)
    if candidates:
        visual = visual & _prompt_columns(shape, candidates)
    valid = _valid(call.get("attention_mask"), shape, past)
    documents = find_documents(call, shape, valid, past) if may_be_packed else None
    labels, query = _supervised(call, shape), _fitted(given.query, "query_mask", shape, past)
    return Prompt(call, shape, past, visual, valid, documents, labels, query, candidates)


def read_prompt_masks(
    prompt: Prompt,
    info: ModelInfo,
    training: bool,
    grouping: str,
    given_frames: Sequence[int] | None = None,
    beams: int = 1,
) -> PromptMasks:
    """Compute the masks of a prefill.

    Args:
        training: True for a training forward, in which only labels or a query mask define query tokens.
        grouping: "sample", "image" or "frame": which visual tokens share a quota.
        given_frames: the number of frames of each video given to `generate`, which its forwards do not tell.
        beams: how often `generate` has repeated each sample.
    """
    valid, documents, labels = prompt.valid, prompt.documents, prompt.labels
    there = torch.ones(prompt.shape, dtype=torch.bool) if valid is None else valid
    visual, text = prompt.visual & there, ~prompt.visual & there
    query, protected, ignored = prompt.query, torch.zeros_like(visual), None
    if labels is not None:
        answer, text = labels & text, text & ~labels
        protected = pad(answer[:, 1:], (0, 1))
        # Visual tokens, and tokens that padding or a visual token that may be dropped would predict, are not scored.
        blind = visual & ~protected if valid is None else (visual & ~protected) | ~valid
        blind = labels & (prompt.visual | pad(blind, (1, 0))[:, :-1])
        ignored = blind if bool(blind.any()) else None
        if query is None:
            query = protected & ~answer
            if documents is not None:  # the last token of a document precedes no answer of its own
                query &= ~pad(documents[:, 1:] != documents[:, :-1], (0, 1))
    elif query is None and training:
        query = protected
    elif query is None:
        asked = there & _prompt_columns(prompt.shape, prompt.candidates)
        query = asked & (torch.arange(prompt.shape[1]) == last_column(asked, documents))
    query = query & there
    groups = _groups(prompt, info, grouping, visual, given_frames, beams)
    if documents is not None:
        groups = counted_along(groups + documents * prompt.shape[1], visual)
    columns = torch.arange(prompt.shape[1])
    instruction = text & (columns > last_column(visual, documents)) & (columns <= last_column(query, documents))
    return PromptMasks(
        visual, query, instruction, protected | query, valid, groups, prompt.past, documents, labels, ignored
    )


def extend_prompt_masks(masks: PromptMasks, call: Mapping[str, Any], shape: tuple[int, int]) -> PromptMasks:
    """Extend the prompt's masks for a later, uncached step of its generation: new tokens are text, not queries."""
    new = shape[1] - masks.visual.shape[1]
    names = ("visual", "queries", "instruction", "protected", "groups")
    extended: dict[str, Any] = {name: pad(getattr(masks, name), (0, new)) for name in names}
    return replace(masks, **extended, valid=_valid(call.get("attention_mask"), shape, masks.past))


def last_column(mask: Tensor, documents: Tensor | None) -> Tensor:
    """(B, L) the last True of `mask` in each column's row, or in its document of `documents`; -1 if there is none."""
    columns = torch.arange(mask.shape[1]).expand_as(mask).masked_fill(~mask, -1)
    if documents is None:
        return columns.max(1, keepdim=True).values.expand_as(columns)
    last = columns.new_full((len(mask), int(documents.max()) + 1), -1)
    return last.scatter_reduce(1, documents, columns, "amax").gather(1, documents)


def _prompt_columns(shape: tuple[int, int], candidates: int) -> Tensor:
    """(L,) bool, False at candidate tokens at the end."""
    return torch.arange(shape[1]) < shape[1] - candidates


def _supervised(call: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """(B, L) bool, the tokens with a label; None without labels, and if the labels are not those of tokens."""
    labels = call.get("labels")
    if not isinstance(labels, Tensor):
        return None
    if labels.shape == shape:
        return labels.cpu() != IGNORED_LABEL
    columns = labelled_columns(call, shape)
    if columns is None:
        return None
    supervised = torch.zeros(shape, dtype=torch.bool)
    supervised[:, columns] = labels[:, 1:].cpu() != IGNORED_LABEL
    return supervised


def labelled_columns(call: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """(N - 1,) long, the columns of the tokens of (B, N) labels after the first label, which is never scored.

    A trainer that wants the logits of N columns (`logits_to_keep`: the last N, or a mask, or indices) gives N labels.
    The loss shifts them by one, so that the k-th column predicts label k + 1, whose token follows that column. None if
    there are as many labels as tokens, or if they do not fit `logits_to_keep`.
    """
    labels, keep, columns = call.get("labels"), call.get("logits_to_keep", 0), torch.arange(shape[1])
    if not isinstance(labels, Tensor) or labels.shape == shape:
        return None
    columns = columns[keep.cpu()] if isinstance(keep, Tensor) else columns[-keep or 0 :]
    behind = columns[:-1] + 1
    return behind if labels.shape == (shape[0], len(columns)) and not bool((behind >= shape[1]).any()) else None


def _visual_from_ids(call: Mapping[str, Any], shape: tuple[int, int], info: ModelInfo) -> Tensor:
    ids, types = call.get("input_ids"), call.get("mm_token_type_ids")
    if ids is not None and info.visual_ids:
        return _among(ids, info.visual_ids)
    if isinstance(types, Tensor) and types.shape == shape:
        return types.cpu() > 0
    raise ValueError(
        "visual_mask is needed: this call has no ids of visual tokens (inputs_embeds, or a text model). Give a "
        "(batch, length) bool mask: with method(model, visual_mask=mask)"
    )


def _among(ids: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return torch.isin(ids.cpu(), torch.tensor(numbers))


def _groups(
    prompt: Prompt, info: ModelInfo, grouping: str, visual: Tensor, given_frames: Sequence[int] | None, beams: int
) -> Tensor:
    if grouping == "sample":
        return torch.zeros_like(visual, dtype=torch.long)
    # The model counts its images by all image tokens, including those at padding.
    marked, ids = prompt.visual, prompt.call.get("input_ids")
    video = torch.zeros_like(marked) if ids is None else _among(ids, info.video_ids) & marked
    lengths = info.image_lengths(prompt.call, marked & ~video)
    frames = video_frames(prompt.call, info.merged_frames)
    if frames is None and given_frames is not None:
        frames = frames_of_beams(given_frames, video, beams)
    return group_tokens(grouping, marked, video, lengths, frames, encoded_lengths(prompt.call, "video")) * visual


def _fitted(mask: Tensor | None, name: str, shape: tuple[int, int], past: int) -> Tensor | None:
    """The user's mask cut to this call, of the call's shape or of all columns so far, and repeated for beams."""
    if mask is None:
        return None
    batch, length = shape
    if mask.shape[1] == past + length:
        mask = mask[:, past:]
    if mask.shape[1] != length or batch % len(mask):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but this call has {batch} x {length} tokens")
    mask = mask.cpu()
    return mask if batch == len(mask) else mask.repeat_interleave(batch // len(mask), 0)


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


_ANSWERS = (
    "Supervise the answers alone (with TRL: prompt and completion, or assistant_only_loss=True), or give query_mask"
)


def remark(masks: PromptMasks, drops: bool, query_given: bool) -> str | None:
    """A warning about what a training or evaluation loop probably did not intend, with a remedy; None if all is well.

    With `query_given`, a query_mask and not the labels defines the query tokens.
    """
    if not drops:
        return f"drops nothing in this forward: {_why_nothing(masks, query_given)}"
    if masks.labels is None or query_given:
        return None
    queries = masks.queries, masks.queries & ~masks.visual
    asked, asked_by_text = (last_column(tokens, masks.documents) >= 0 for tokens in queries)
    if bool((masks.visual & asked & ~asked_by_text).any()):
        return (
            "ranks by visual tokens in this forward, which have not read the question: the text behind an image is "
            f"supervised from its first token on, and the token before it asks. {_ANSWERS}. Labels of visual tokens "
            "are ignored"
        )
    if masks.ignored is not None and bool((masks.ignored & masks.visual).any()):
        return "ignores labels of visual tokens, for it drops such tokens: set them to -100"
    return None


def _why_nothing(masks: PromptMasks, query_given: bool) -> str:
    if masks.queries.any():
        return "the samples that ask have so few visual tokens that the schedule keeps them all"
    if query_given:
        return "query_mask marks no token"
    if masks.labels is None:
        return "it has no labels, so no token asks. Pass labels to the model, or give query_mask, or call model.eval()"
    if not masks.protected.any():
        return (
            "no label of its text is supervised, so no token asks. Give the answers their token ids as labels, and all "
            "other tokens -100"
        )
    return f"its text is supervised from the first token on, so no token stands before an answer and asks. {_ANSWERS}"
