"""Rows: gather the kept ones, scatter them back to full length, and find the documents of packed rows.

Packed rows hold several documents, each of which is a sample of its own. They are found on the host, once a prefill;
ranking then sees the documents as rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows that a drop keeps. They are decided once, so that gradient checkpointing replays the same decision.

    Attributes:
        rows: (B, N) long, columns of this call.
        index: (B, N) long, the same rows as indices among the remaining rows before the drop.
        valid: (B, N) bool, False at padding; None if there is none.
    """

    rows: Tensor
    index: Tensor
    valid: Tensor | None


def take_rows(tensor: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """Gather `rows` (B, N) of `tensor` along `dim`; the batch dimension is the one before, B or 1 (broadcast)."""
    rows = rows.to(tensor.device)
    if len(rows) == 1 and tensor.shape[dim - 1] == 1:
        return tensor.index_select(dim, rows[0])
    if dim == 1 and len(tensor) == len(rows):
        # Copying whole rows is several times faster than an element-wise gather of wide hidden states.
        first = torch.arange(len(rows), device=rows.device)[:, None] * tensor.shape[1]
        return tensor.flatten(0, 1).index_select(0, (rows + first).flatten()).view(*rows.shape, *tensor.shape[2:])
    shape = [*tensor.shape]
    shape[dim - 1] = len(rows)
    source = tensor.expand(shape)
    shape[dim] = rows.shape[1]
    return source.gather(dim, _aligned(rows, tensor.dim(), dim - 1, dim).expand(shape))


def take_hidden(hidden: Tensor, rows: Tensor) -> Tensor:
    """Gather `rows` (B, N) of hidden states (B, L, D), or (streams, B, L, D) of models with several (Gemma 3n)."""
    return take_rows(hidden, rows, dim=hidden.dim() - 2)


def scatter_rows(tensor: Tensor, rows: Tensor, valid: Tensor | None, length: int, dim: int = 1) -> Tensor:
    """Undo `take_rows`: scatter (B, N at `dim`, ...) to `length` columns, with zeros at columns without a valid row."""
    rows = rows.to(tensor.device)
    if valid is not None:
        tensor = tensor * _aligned(valid.to(tensor.device), tensor.dim(), 0, dim)
    shape = [*tensor.shape]
    shape[dim] = length
    return tensor.new_zeros(shape).scatter(dim, _aligned(rows, tensor.dim(), 0, dim).expand_as(tensor), tensor)


def give_back(
    output: Any,
    last: Callable[[Tensor], Tensor],
    hidden: Callable[[int, Tensor | None], Tensor | None],
    attention: Callable[[int, Tensor | None], Tensor | None],
) -> Any:
    """Restore the rows of a text model's output to the places that the caller expects.

    Args:
        last: restores the last hidden state.
        hidden, attention: restore the output hidden state and the attention weights of a layer, given its number.
    """
    if isinstance(output, tuple):
        return (last(output[0]), *output[1:])
    output.last_hidden_state = last(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(
            hidden(max(number - 1, 0), state) for number, state in enumerate(output.hidden_states)
        )
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(attention(*item) for item in enumerate(output.attentions))
    return output


def take_next_labels(labels: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N) the label that each of `rows` predicts, which is the next one; -100 at padding."""
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    taken = take_rows(following, rows)
    return taken if valid is None else taken.masked_fill(~valid.to(taken.device), -100)


def take_positions(ids: Tensor, rows: Tensor) -> Tensor:
    """Gather position ids (..., B or 1, L), with one axis or several."""
    return take_rows(ids, rows, dim=ids.dim() - 1)


def take_embeddings(table: Tensor, rows: Tensor) -> Tensor:
    """Gather position embeddings (..., B or 1, L, d), real or complex."""
    return take_rows(table, rows, dim=table.dim() - 2)


def _aligned(table: Tensor, dims: int, batch: int, column: int) -> Tensor:
    """View a (B, N) table so that it broadcasts against a tensor of `dims` dimensions."""
    shape = [1] * dims
    shape[batch], shape[column] = table.shape
    return table.view(shape)


@dataclass(frozen=True)
class Packing:
    """The documents of a call with packed rows, numbered through the batch.

    Attributes:
        documents: (B, L) long, the document of each column; `count` at padding.
        count: number of documents.
        rows: (S,) long, the row of the batch that holds each document.
        owners: (B, G) long, the document of each group of visual tokens; `count` if a row does not have the group.
        lengths: (S,) long, the number of tokens of each document.
        queries, instruction: the largest numbers of query tokens and instruction tokens of a document; at least 1.
    """

    documents: Tensor
    count: int
    rows: Tensor
    owners: Tensor
    lengths: Tensor
    queries: int
    instruction: int

    def to(self, device: torch.device) -> Packing:
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def per_document(self, per_group: Tensor) -> Tensor:
        """(S,) the sum over the groups (B, G) of each document."""
        sums = per_group.new_zeros(self.count + 1)
        return sums.scatter_add(0, self.owners.flatten(), per_group.flatten())[: self.count]


@dataclass(frozen=True)
class Bounds:
    """The bounds of the documents among the rows of one stage.

    Attributes:
        cumulative: (S + 1,) int32, the first row of each document, and the end of the last, as flash kernels take them.
        longest: number of rows of the longest document.
    """

    cumulative: Tensor
    longest: int

    def to(self, device: torch.device) -> Bounds:
        """The same with its tensor on `device`."""
        return replace(self, cumulative=self.cumulative.to(device))

    @classmethod
    def of(cls, lengths: Tensor) -> Bounds:
        """Build from the `lengths` (S,) long of the documents, on the CPU."""
        cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return cls(cumulative.to(torch.int32), max(1, int(lengths.max())))


class Unpacked:
    """Documents as the rows of a batch: S documents of at most `width` tokens, in their order.

    Args:
        documents: (B, n) long, the document of each of n tokens in a row; `count` at tokens outside of documents.
        count: number of documents, S.
        width: number of tokens of the longest document.
    """

    def __init__(self, documents: Tensor, count: int, width: int) -> None:
        flat = documents.flatten()
        sizes = flat.new_zeros(count + 1).scatter_add(0, flat, torch.ones_like(flat))
        first = (sizes.cumsum(0) - sizes)[:count, None]
        columns = torch.arange(width, device=flat.device)
        places = (first + columns).clamp(max=len(flat) - 1)
        self.shape = documents.shape
        self.index = flat.sort(stable=True).indices[places]  # (S, width) among the B * n tokens
        self.valid = columns < sizes[:count, None]  # (S, width)

    def take(self, tokens: Tensor) -> Tensor:
        """Gather (B, n, ...) to (S, width, ...)."""
        return tokens.flatten(0, 1)[self.index.to(tokens.device)]

    def put(self, values: Tensor) -> Tensor:
        """Scatter (S, width) to (B, n), with 0 at tokens outside of documents."""
        total = self.shape.numel()
        places = self.index.masked_fill(~self.valid, total).to(values.device)
        return values.new_zeros(total + 1).scatter(0, places.flatten(), values.flatten())[:-1].view(self.shape)


def find_documents(call: Mapping[str, Any], shape: tuple[int, int], valid: Tensor | None, past: int) -> Tensor | None:
    """(B, L) long on the CPU, the document of each column counted along its row from 0; None if no row is packed.

    The documents are found as Transformers finds them: by `cu_seq_lens_q`; else by a mask of four dimensions, in which
    a document's first token does not attend to the token before it; else by position ids that start again. (Of several
    position axes, the first one counts: the text's, or time.)

    Args:
        shape: the shape (B, L) of the call's tokens.
        valid: (B, L) bool on the CPU, False at padding; None if there is none.
        past: number of columns in the KV cache before this call.

    Raises:
        ValueError: if `cu_seq_lens_q` does not describe one row, and for packed rows on top of a cache.
    """
    bounds, mask, positions = call.get("cu_seq_lens_q"), call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if bounds is not None:
        starts = _bounded(bounds.cpu(), shape)
    elif mask is not None and mask.dim() == 4:
        starts = _unseen(mask[..., past : past + shape[1]], shape)
    elif positions is not None:
        starts = _restarted(positions, shape)
    else:
        return None
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    starts = starts & valid & (valid.cumsum(1) > 1)  # a row's first token does not begin a further document
    if not bool(starts.any()):
        return None
    if past:
        raise ValueError(
            "several documents in one row (position_ids that start again) cannot go on top of a KV cache; give each a "
            "row of its own"
        )
    return starts.cumsum(1)


def _bounded(bounds: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L) bool, the first tokens of documents, by cumulative lengths."""
    if shape[0] != 1 or int(bounds[-1]) != shape[1]:
        raise ValueError(
            f"cu_seq_lens_q must describe one row of packed documents, from 0 to its length; it ends at "
            f"{int(bounds[-1])}, and this call has {shape[0]} x {shape[1]} tokens"
        )
    starts = torch.zeros(shape, dtype=torch.bool)
    starts[0, bounds[bounds < shape[1]].long()] = True
    return starts


def _unseen(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L) bool, tokens that do not attend to the one before them in a prepared mask (B or 1, heads or 1, L, L)."""
    before = mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)
    seen = before if before.dtype == torch.bool else before >= 0
    return torch.nn.functional.pad(~seen.cpu(), (1, 0)).expand(shape)


def _restarted(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L) bool, tokens at which position ids (..., B or 1, L) start again.

    Position ids fall there, or repeat the row's first position (a document of one token). Several axes without a text
    axis are an exception, because an image also repeats positions.
    """
    several_axes = positions.dim() == 3
    ids = positions[0] if several_axes else positions
    if ids.dim() != 2 or ids.shape[1] != shape[1]:
        return torch.zeros(shape, dtype=torch.bool)
    ids = ids.cpu().expand(shape)
    falls = ids[:, 1:] < ids[:, :-1]
    if not several_axes or len(positions) == 4:
        falls = falls | ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] == ids.min(1, keepdim=True).values))
    return torch.nn.functional.pad(falls, (1, 0))
