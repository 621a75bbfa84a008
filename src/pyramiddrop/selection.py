"""Select the kept rows from scores and counts, and merge dropped tokens into them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


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
    kept = rank < torch.nn.functional.pad(num_keep, (0, 1)).gather(1, owner)
    return torch.zeros_like(candidates).scatter(1, order, kept)


def best(scores: Tensor, count: int) -> Tensor:
    """(B, count) long: the columns of the best `count` scores (B, N) of each row; equal scores go to the lower column.

    The result is that of `select` if all columns of a row are candidates of one group.
    """
    # Not topk, whose choice between equal scores is undefined.
    guarded = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"))
    return guarded.sort(descending=True, stable=True).indices[:, :count]


def compact(kept: Tensor, length: int, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """Left-pad the kept rows of all samples to `length` columns, in their order.

    Padding is on the left so that a KV cache can still be cropped at its end.

    Args:
        kept: (B, N) bool, the kept rows; no sample has more than `length`.
        length: number of kept rows of the longest sample.
        ragged: True if some sample keeps fewer than `length` rows.

    Returns:
        rows: (B, length) long, the indices of the kept rows, ascending; padding has indices of dropped rows.
        valid: (B, length) bool, False at padding, or None if there is none.
    """
    rows = kept.to(torch.uint8).sort(dim=1, stable=True).indices[:, kept.shape[1] - length :]
    return rows, kept.gather(1, rows) if ragged else None


def merge(
    hidden: Tensor, sizes: Tensor, visual: Tensor, groups: Tensor, index: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Average dropped visual tokens into the kept rows.

    Each dropped token is merged into the kept visual token of its group with the most similar hidden state (cosine).
    The average is weighted by how many tokens each row stands for, as in ToMe (arXiv 2210.09461). Rows that receive
    no token are unchanged, and tokens of a group without a kept token are discarded.

    Args:
        hidden: (B, N, D).
        sizes: (B, N) float, how many tokens each row stands for.
        visual: (B, N) bool, the visual tokens.
        groups: (B, N) long, the group of each visual token.
        index: (B, n) long, the kept rows.
        valid: (B, n) bool, False at padding, or None if there is none.

    Returns:
        (B, n, D) hidden states and (B, n) sizes.
    """
    alive = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    dropped = visual & ~torch.zeros_like(visual).scatter(1, index, alive)
    target, has_target = _most_similar(hidden, groups, index, visual.gather(1, index) & alive)
    dropped &= has_target
    kept, kept_sizes = hidden.gather(1, _widened(index, hidden)), sizes.gather(1, index)
    weighted = (hidden.float() * sizes[..., None]).masked_fill(~dropped[..., None], 0)
    total = (kept.float() * kept_sizes[..., None]).scatter_add(1, _widened(target, hidden), weighted)
    new_sizes = kept_sizes.scatter_add(1, target, sizes.masked_fill(~dropped, 0))
    merged = (total / new_sizes[..., None]).to(hidden.dtype)
    return torch.where((new_sizes > kept_sizes)[..., None], merged, kept), new_sizes


@torch.no_grad()
def _most_similar(hidden: Tensor, groups: Tensor, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the most similar kept row `index` (B, n) of its group among `targets` (B, n).

    Returns:
        (B, N) long, its place among the kept rows; and (B, N) bool, whether there is one.
    """
    unit = normalize(hidden.float(), dim=-1)
    similarity = unit @ unit.gather(1, _widened(index, unit)).transpose(1, 2)
    same_group = groups[:, :, None] == groups.gather(1, index)[:, None]
    best = similarity.masked_fill(~(same_group & targets[:, None]), float("-inf")).max(-1)
    return best.indices, best.values > float("-inf")


def _widened(index: Tensor, hidden: Tensor) -> Tensor:
    """(B, n, D): `index` (B, n), repeated over the D columns of `hidden`."""
    return index[..., None].expand(-1, -1, hidden.shape[-1])
