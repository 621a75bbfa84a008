"""Selection against an obvious loop, and the rectangle that it is packed into."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramiddrop.selection import compact, select


def slow_select(scores: Tensor, candidates: Tensor, groups: Tensor, num_keep: Tensor) -> Tensor:
    stays = torch.zeros_like(candidates)
    for b in range(len(scores)):
        for g in range(num_keep.shape[1]):
            members = [n for n in range(scores.shape[1]) if candidates[b, n] and groups[b, n] == g]
            members.sort(key=lambda n: (-scores[b, n].item(), n))
            for n in members[: int(num_keep[b, g])]:
                stays[b, n] = True
    return stays


def test_select_agrees_with_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(50):
        num_groups = 1 + case % 3
        scores = torch.randint(0, 5, (3, 12), generator=generator).float()  # many ties
        candidates = torch.rand(3, 12, generator=generator) > 0.4
        groups = torch.randint(0, num_groups, (3, 12), generator=generator).sort(1).values
        num_keep = torch.randint(0, 5, (3, num_groups), generator=generator)
        assert torch.equal(
            select(scores, candidates, groups, num_keep), slow_select(scores, candidates, groups, num_keep)
        )


def test_infinite_scores_win_and_nan_loses() -> None:
    scores = torch.tensor([[1.0, float("inf"), float("nan"), 2.0]])
    everyone = torch.ones(1, 4, dtype=torch.bool)
    stays = select(scores, everyone, torch.zeros(1, 4, dtype=torch.long), torch.tensor([[2]]))
    assert stays.tolist() == [[False, True, False, True]]
    below = select(torch.tensor([[float("nan"), -1.0]]), everyone[:, :2], torch.zeros(1, 2).long(), torch.tensor([[1]]))
    assert below.tolist() == [[False, True]]


def test_an_infinite_score_is_above_the_largest_number() -> None:
    scores = torch.tensor([[torch.finfo(torch.float32).max, float("inf")]])
    stays = select(scores, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1]]))
    assert stays.tolist() == [[False, True]]


def test_compact_keeps_the_order_and_marks_filler() -> None:
    stays = torch.tensor([[True, False, True, True], [False, False, True, False]])
    rows, valid = compact(stays, 3, ragged=True)
    assert rows[0].tolist() == [0, 2, 3]
    assert rows[1, -1] == 2
    assert valid is not None
    assert valid.tolist() == [[True, True, True], [False, False, True]]


def test_compact_has_no_mask_where_nothing_is_ragged() -> None:
    rows, valid = compact(torch.tensor([[True, False, True], [False, True, True]]), 2, ragged=False)
    assert rows.tolist() == [[0, 2], [1, 2]]
    assert valid is None


def test_compact_of_nothing_is_empty() -> None:
    rows, valid = compact(torch.zeros(2, 3, dtype=torch.bool), 0, ragged=False)
    assert rows.shape == (2, 0)
    assert valid is None
