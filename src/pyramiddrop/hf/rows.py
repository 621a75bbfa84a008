"""Gather per-token tensors by the rows that stay, and scatter rows back to full length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows that a drop left. Written once, so that gradient checkpointing replays the same decision.

    Attributes:
        rows: (B, N) long, columns of this call.
        index: (B, N) long, the same rows counted among those that were left before the drop.
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
        # Whole rows are copied: several times faster than an element-wise gather of wide hidden states.
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
    """Undo `take_rows`: (B, N at `dim`, ...) back to `length` columns, with zeros where no valid row is."""
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
    """A text model's output with its rows where the caller expects them.

    Args:
        last: of the last hidden state.
        hidden, attention: of the hidden state that leaves a layer, and of its attention weights, by the layer's number.
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
    """(B, N) what each of `rows` is to predict: the label behind it; -100 at filler."""
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    taken = take_rows(following, rows)
    return taken if valid is None else taken.masked_fill(~valid.to(taken.device), -100)


def take_positions(ids: Tensor, rows: Tensor) -> Tensor:
    """Gather position ids (..., B or 1, L), of one axis or several."""
    return take_rows(ids, rows, dim=ids.dim() - 1)


def take_embeddings(table: Tensor, rows: Tensor) -> Tensor:
    """Gather position embeddings (..., B or 1, L, d), real or complex."""
    return take_rows(table, rows, dim=table.dim() - 2)


def _aligned(table: Tensor, dims: int, batch: int, column: int) -> Tensor:
    """View a (B, N) table so that it broadcasts against a tensor of `dims` dimensions."""
    shape = [1] * dims
    shape[batch], shape[column] = table.shape
    return table.view(shape)
