"""Merge each dropped token into the most similar kept token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def merge(
    hidden: Tensor, sizes: Tensor, visual: Tensor, groups: Tensor, local: Tensor, valid: Tensor | None
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
        local: (B, n) long, the kept rows.
        valid: (B, n) bool, False at padding, or None if there is none.

    Returns:
        (B, n, D) hidden states and (B, n) sizes.
    """
    alive = torch.ones_like(local, dtype=torch.bool) if valid is None else valid
    goes = visual & ~torch.zeros_like(visual).scatter(1, local, alive)
    nearest, found = _nearest(hidden, groups, local, visual.gather(1, local) & alive)
    goes = goes & found
    wide = local[..., None].expand(-1, -1, hidden.shape[-1])
    kept, own = hidden.gather(1, wide), sizes.gather(1, local)
    more = (hidden.float() * sizes[..., None]).masked_fill(~goes[..., None], 0)
    total = (kept.float() * own[..., None]).scatter_add(1, nearest[..., None].expand_as(more), more)
    count = own.scatter_add(1, nearest, sizes.masked_fill(~goes, 0))
    merged = (total / count[..., None]).to(hidden.dtype)
    return torch.where((count > own)[..., None], merged, kept), count


@torch.no_grad()
def _nearest(hidden: Tensor, groups: Tensor, local: Tensor, takes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) each: the most similar kept row of the same group that `takes` tokens (B, n), and whether there is one."""
    unit = normalize(hidden.float(), dim=-1)
    similarity = unit @ unit.gather(1, local[..., None].expand(-1, -1, unit.shape[-1])).transpose(1, 2)
    same = groups[:, :, None] == groups.gather(1, local)[:, None]
    best = similarity.masked_fill(~(same & takes[:, None]), float("-inf")).max(-1)
    return best.indices, best.values > float("-inf")
