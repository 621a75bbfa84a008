"""Rows: gather the kept ones, scatter them back to full length, and find the documents of packed rows.

Packed rows hold several documents, each of which is a sample of its own. They are found on the host, once a prefill;
ranking then sees the documents as rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar

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


Value = TypeVar("Value")


def map_tensors(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    """Apply `function` to a tensor, or to every tensor in a dataclass, tuple or dict."""
    result: Any = value
    if isinstance(value, Tensor):
        result = function(value)
    elif isinstance(value, tuple):
        result = tuple(map_tensors(part, function) for part in value)
    elif isinstance(value, dict):
        result = {key: map_tensors(part, function) for key, part in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(value, **map_tensors(vars(value), function))
    return result  # type: ignore[no-any-return]


def take_rows(tensor: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """Gather `rows` (B, N) of `tensor` along `dim`; the batch dimension is the one before, B or 1 (broadcast).

    With -2: hidden states (B, L, D), or (streams, B, L, D) of models with several (Gemma 3n). With -1: position ids
    (..., B or 1, L), with one axis or several.
    """
    rows, dim = rows.to(tensor.device), dim % tensor.dim()
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


def scatter_rows(tensor: Tensor, rows: Tensor, valid: Tensor | None, length: int, dim: int = 1) -> Tensor:
    """Undo `take_rows`: scatter (B, N at `dim`, ...) to `length` columns, with zeros at columns without a valid row."""
    rows = rows.to(tensor.device)
    if valid is not None:
        tensor = tensor * _aligned(valid.to(tensor.device), tensor.dim(), 0, dim)
    shape = [*tensor.shape]
    shape[dim] = length
    return tensor.new_zeros(shape).scatter(dim, _aligned(rows, tensor.dim(), 0, dim).expand_as(tensor), tensor)


def take_next_labels(labels: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N) the label that each of `rows` predicts, which is the next one; -100 at padding."""
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    taken = take_rows(following, rows)
    return taken if valid is None else taken.masked_fill(~valid.to(taken.device), -100)


def take_embeddings(embeddings: Any, rows: Tensor) -> Any:
    """Gather position embeddings (..., B or 1, L, d), real or complex, in one table or several."""
    if isinstance(embeddings, Tensor):
        return take_rows(embeddings, rows, -2)
    return tuple(take_embeddings(table, rows) for table in embeddings)


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

    def bounds(self, dropped: Tensor) -> Bounds:
        """The bounds of the documents after `dropped` (B, G) tokens of each group."""
        sums = dropped.new_zeros(self.count + 1)
        return Bounds.of(self.lengths - sums.scatter_add(0, self.owners.flatten(), dropped.flatten())[: self.count])


@dataclass(frozen=True)
class Bounds:
    """The bounds of the documents among the rows of one stage.

    Attributes:
        cumulative: (S + 1,) int32, the first row of each document, and the end of the last, as flash kernels take them.
    """

    cumulative: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor) -> Bounds:
        """Build from the `lengths` (S,) long of the documents, on the CPU."""
        cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return cls(cumulative.to(torch.int32), max(1, int(lengths.max())))


class Unpacked:
    """Documents as the rows of a batch: S documents of at most `width` tokens, in their order.

    Args:
        documents: (B, n) long, the document of each of n tokens in a row; `count` at tokens outside of documents.
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
        valid: (B, L) bool on the CPU, False at padding; None if there is none.
        past: number of columns in the KV cache before this call.
    """
    bounds, mask, positions = call.get("cu_seq_lens_q"), call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if bounds is not None:
        if shape[0] != 1 or int(bounds[-1]) != shape[1]:
            raise ValueError(
                f"cu_seq_lens_q must describe one row of packed documents, from 0 to its length; it ends at "
                f"{int(bounds[-1])}, and this call has {shape[0]} x {shape[1]} tokens"
            )
        starts, first = torch.zeros(shape, dtype=torch.bool), bounds.cpu().long()
        starts[0, first[first < shape[1]]] = True
    elif mask is not None and mask.dim() == 4:
        before = mask[:, 0, :, past : past + shape[1]].diagonal(offset=-1, dim1=-2, dim2=-1)
        seen = before if before.dtype == torch.bool else before >= 0
        starts = torch.nn.functional.pad(~seen.cpu(), (1, 0)).expand(shape)
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
