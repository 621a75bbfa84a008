"""Merging on numbers small enough to check by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyramiddrop import UniformDrop
from pyramiddrop.selection import merge
from tiny import collate, make_rows, tiny_model

# One sample: text, four visual tokens in two directions, text. Token 1 is like token 3, token 2 like token 4.
HIDDEN = torch.tensor([[[9.0, 9.0], [2.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 6.0], [7.0, 7.0]]])
VISUAL = torch.tensor([[False, True, True, True, True, False]])
ONE = torch.zeros(1, 6, dtype=torch.long)


def merged(
    stays: list[int], sizes: list[float] | None = None, groups: Tensor = ONE, valid: Tensor | None = None
) -> tuple[list[list[float]], list[float]]:
    hidden, left = merge(HIDDEN, torch.tensor([sizes or [1.0] * 6]), VISUAL, groups, torch.tensor([stays]), valid)
    return hidden[0].tolist(), left[0].tolist()


def test_each_goes_into_the_one_that_is_most_like_it() -> None:
    hidden, sizes = merged([0, 3, 4, 5])
    assert hidden == [[9, 9], [3, 0], [0, 4], [7, 7]]
    assert sizes == [1, 2, 2, 1]


def test_a_token_counts_for_all_that_have_gone_into_it() -> None:
    hidden, sizes = merged([0, 3, 4, 5], [1, 3, 1, 1, 1, 1])
    assert hidden[1] == [(3 * 2 + 4) / 4, 0]
    assert sizes == [1, 4, 2, 1]
    hidden, sizes = merged([0, 3, 4, 5], [1, 1, 1, 3, 1, 1])
    assert hidden[1] == [(2 + 3 * 4) / 4, 0]
    assert sizes == [1, 4, 2, 1]


def test_a_row_of_some_size_that_takes_nothing_in_keeps_its_bits() -> None:
    """A third of three times a number is not always that number."""
    torch.manual_seed(0)
    hidden, visual = torch.randn(1, 64, 3), torch.ones(1, 64, dtype=torch.bool)
    left, sizes = merge(
        hidden, torch.full((1, 64), 3.0), visual, torch.zeros(1, 64).long(), torch.arange(64)[None], None
    )
    assert torch.equal(left, hidden)
    assert torch.equal(sizes, torch.full((1, 64), 3.0))


def test_a_group_of_which_nothing_stays_goes_into_none() -> None:
    hidden, sizes = merged([0, 5])
    assert hidden == [[9, 9], [7, 7]]
    assert sizes == [1, 1]
    groups = torch.tensor([[0, 0, 0, 1, 1, 0]])  # of the second one, token 3 stays
    hidden, sizes = merged([0, 3, 5], groups=groups)
    assert hidden == [[9, 9], [2, 3], [7, 7]]
    assert sizes == [1, 2, 1]


def test_text_takes_nothing_in_and_rows_that_take_nothing_are_untouched() -> None:
    """Token 2 is at 45 degrees to text and at 90 to token 3: it goes into the visual one."""
    hidden, sizes = merged([0, 1, 3, 4, 5])
    assert hidden == [[9, 9], [2, 0], [4, 0], [0, 4], [7, 7]]
    assert sizes == [1, 1, 1, 2, 1]
    hidden, _ = merged([0, 3, 5])
    assert hidden == [[9, 9], [(2 + 0 + 4 + 0) / 4, (0 + 2 + 0 + 6) / 4], [7, 7]]


def test_a_token_stays_in_its_group() -> None:
    """Tokens 1 and 4 are one image, 2 and 3 another: 1 must go into 4, though 3 is more like it."""
    hidden, _ = merged([0, 3, 4, 5], groups=torch.tensor([[0, 0, 1, 1, 0, 0]]))
    assert hidden == [[9, 9], [2, 1], [1, 3], [7, 7]]


def test_filler_takes_nothing_in() -> None:
    """Row 3 stands in the rectangle as filler: it goes, too, and all go into token 4."""
    hidden, sizes = merged([3, 0, 4, 5], valid=torch.tensor([[False, True, True, True]]))
    assert hidden[1:] == [[9, 9], [1.5, 2], [7, 7]]
    assert sizes[1:] == [1, 4, 1]


def test_half_precision_comes_back_as_it_was() -> None:
    half, _ = merge(HIDDEN.bfloat16(), torch.ones(1, 6), VISUAL, ONE, torch.tensor([[0, 3, 4, 5]]), None)
    assert half.dtype == torch.bfloat16


# --- Over the stages of a model -------------------------------------------------------------------------------------


SPECS: list[list[Any]] = [[5, "image", 7], [3, "image", 2, "image", 4], [9]]


def merged_logits(rows: slice, layers: list[int], keep: list[float], per_image: bool = False) -> Tensor:
    """The last token's logits of some of the rows as one batch."""
    model = tiny_model("llava-gqa")
    with torch.no_grad(), UniformDrop(layers=layers, keep=keep, merge=True, per_image=per_image)(model):
        logits: Tensor = model(**collate(make_rows(model, SPECS)[rows])).logits[:, -1]
    return logits


@pytest.mark.parametrize("idle", [[2, 3, 6], [2, 4, 6], [2, 5, 6]])
def test_a_stage_that_drops_nothing_changes_nothing(idle: list[int]) -> None:
    with_idle = merged_logits(slice(1), idle, [0.5, 0.5, 0.25])
    assert torch.equal(with_idle, merged_logits(slice(1), [2, 6], [0.5, 0.25]))


def test_several_stages_that_drop_nothing_change_nothing() -> None:
    with_idle = merged_logits(slice(1), [1, 2, 3, 4, 6], [1.0, 0.5, 0.5, 0.5, 0.25])
    assert torch.equal(with_idle, merged_logits(slice(1), [2, 6], [0.5, 0.25]))


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("keep", [[0.5, 0.45, 0.25], [0.6, 0.57, 0.25]], ids=["all drop", "the mate alone drops"])
def test_a_sample_merges_as_without_its_mates(keep: list[float], per_image: bool) -> None:
    """At 0.6 and 0.57 an image of 16 tokens keeps 9 twice, and two that share a quota keep 19 and 18."""
    both = merged_logits(slice(3), [2, 4, 6], keep, per_image)
    for number in range(3):
        alone = merged_logits(slice(number, number + 1), [2, 4, 6], keep, per_image)
        torch.testing.assert_close(both[number], alone[0], atol=1e-5, rtol=1e-5)
