"""Packed rows: several documents in one row, each of which is a sample of its own.

Which they are is read on the host, once a prefill; what ranks is then shown the documents as rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The documents of a call with packed rows, numbered through the batch.

    Attributes:
        documents: (B, L) long, the document of each column; `count` at padding.
        count: number of documents.
        rows: (S,) long, the row of the batch that holds each document.
        owners: (B, G) long, the document of each group of visual tokens; `count` where a row has no such group.
        lengths: (S,) long, tokens of each document.
        queries, instruction: the most query tokens, and instruction tokens, that a document has; at least 1.
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
        """(S,) the sums of what the groups (B, G) of each document have."""
        sums = per_group.new_zeros(self.count + 1)
        return sums.scatter_add(0, self.owners.flatten(), per_group.flatten())[: self.count]


@dataclass(frozen=True)
class Bounds:
    """The rows that each document has in one stage.

    Attributes:
        cumulative: (S + 1,) int32, the first row of each document, and the end of the last, as flash kernels take it.
        longest: rows of the longest document.
    """

    cumulative: Tensor
    longest: int

    def to(self, device: torch.device) -> Bounds:
        """The same with its tensor on `device`."""
        return replace(self, cumulative=self.cumulative.to(device))

    @classmethod
    def of(cls, lengths: Tensor) -> Bounds:
        """`lengths`: (S,) long, on the CPU."""
        cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return cls(cumulative.to(torch.int32), max(1, int(lengths.max())))


class Unpacked:
    """Documents as the rows of a batch: S documents of at most `width` tokens, in the order that they have.

    Args:
        documents: (B, n) long, the document of each of n tokens a row; `count` at those that are in none.
        count: number of documents, S.
        width: tokens of the longest document.
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
        """(S, width, ...) of (B, n, ...)."""
        return tokens.flatten(0, 1)[self.index.to(tokens.device)]

    def put(self, values: Tensor) -> Tensor:
        """(B, n) of (S, width); 0 at tokens that are in no document."""
        total = self.shape.numel()
        places = self.index.masked_fill(~self.valid, total).to(values.device)
        return values.new_zeros(total + 1).scatter(0, places.flatten(), values.flatten())[:-1].view(self.shape)


def find_documents(call: Mapping[str, Any], shape: tuple[int, int], valid: Tensor | None, past: int) -> Tensor | None:
    """(B, L) long on the CPU, the document of each column counted along its row from 0; None where no row is packed.

    What says so, as Transformers reads it: `cu_seq_lens_q`; else a mask of four dimensions, in which a document's first
    token does not see the token before; else position ids that start again. (Of positions with several axes the first
    counts: the text's, or time.)

    Args:
        shape: of the call's tokens.
        valid: (B, L) bool on the CPU, False at padding, or None where there is none.
        past: columns in the KV cache.

    Raises:
        ValueError: where `cu_seq_lens_q` does not describe one row, and for packed rows on top of a cache.
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
    starts = starts & valid & (valid.cumsum(1) > 1)  # a row's first token begins no further document
    if not bool(starts.any()):
        return None
    if past:
        raise ValueError(
            "several documents in one row (position_ids that start again) cannot go on top of a KV cache; give each a "
            "row of its own"
        )
    return starts.cumsum(1)


def _bounded(bounds: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L) where documents begin, by their cumulative lengths."""
    if shape[0] != 1 or int(bounds[-1]) != shape[1]:
        raise ValueError(
            f"cu_seq_lens_q must describe one row of packed documents, from 0 to its length; it ends at "
            f"{int(bounds[-1])}, and this call has {shape[0]} x {shape[1]} tokens"
        )
    starts = torch.zeros(shape, dtype=torch.bool)
    starts[0, bounds[bounds < shape[1]].long()] = True
    return starts


def _unseen(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L) where a token does not see the one before it in a prepared mask (B or 1, heads or 1, L, L)."""
    before = mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)
    seen = before if before.dtype == torch.bool else before >= 0
    return torch.nn.functional.pad(~seen.cpu(), (1, 0)).expand(shape)


def _restarted(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L) where position ids (..., B or 1, L) start again: they fall, or stay at the row's first position (a
    document of one token; not where positions have several axes and no text axis, for an image stays there)."""
    several_axes = positions.dim() == 3
    ids = positions[0] if several_axes else positions
    if ids.dim() != 2 or ids.shape[1] != shape[1]:
        return torch.zeros(shape, dtype=torch.bool)
    ids = ids.cpu().expand(shape)
    falls = ids[:, 1:] < ids[:, :-1]
    if not several_axes or len(positions) == 4:
        falls = falls | ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] == ids.min(1, keepdim=True).values))
    return torch.nn.functional.pad(falls, (1, 0))
