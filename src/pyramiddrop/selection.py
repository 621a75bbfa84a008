"""Select the kept rows from scores and counts, deterministically also for equal scores."""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores: Tensor, candidates: Tensor, groups: Tensor, num_keep: Tensor) -> Tensor:
    """Mark the best `num_keep` candidates of every group; equal scores go to the lower column.

    Args:
        scores: (B, N) float.
        candidates: (B, N) bool, the tokens that compete.
        groups: (B, N) long in [0, G), the group of each candidate.
        num_keep: (B, G) long.

    Returns:
        (B, N) bool, True at the kept candidates.
    """
    # An infinite score stays infinite: it marks tokens that must be kept, above any score of a scorer.
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf")).masked_fill(~candidates, float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    # Stable again, by group. Tokens that are not candidates form an extra last group, of which none is kept.
    num_groups = num_keep.shape[1]
    owner = groups.masked_fill(~candidates, num_groups).gather(1, order)
    owner, by_group = owner.sort(dim=1, stable=True)
    order = order.gather(1, by_group)

    sizes = torch.zeros(len(num_keep), num_groups + 1, dtype=torch.long, device=num_keep.device)
    sizes = sizes.scatter_add(1, owner, torch.ones_like(owner))
    first = sizes.cumsum(1) - sizes
    rank = torch.arange(order.shape[1], device=order.device) - first.gather(1, owner)
    stays = rank < torch.nn.functional.pad(num_keep, (0, 1)).gather(1, owner)
    return torch.zeros_like(candidates).scatter(1, order, stays)


def best(scores: Tensor, count: int) -> Tensor:
    """(B, count) long: the columns of the best `count` scores (B, N) of each row; equal scores go to the lower column.

    The result is that of `select` if all columns of a row are candidates of one group.
    """
    # Not topk, whose choice between equal scores is undefined.
    guarded = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"))
    return guarded.sort(descending=True, stable=True).indices[:, :count]


def compact(stays: Tensor, length: int, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """Left-pad the kept rows of all samples to `length` columns, in their order.

    Padding is on the left so that a KV cache can still be cropped at its end.

    Args:
        stays: (B, N) bool, the kept rows; no sample has more than `length`.
        length: number of kept rows of the longest sample.
        ragged: True if some sample keeps fewer than `length` rows.

    Returns:
        rows: (B, length) long, the indices of the kept rows, ascending; padding has indices of dropped rows.
        valid: (B, length) bool, False at padding, or None if there is none.
    """
    rows = stays.to(torch.uint8).sort(dim=1, stable=True).indices[:, stays.shape[1] - length :]
    return rows, stays.gather(1, rows) if ragged else None
