"""The host-side plan: counts, lengths, query tokens and image groups, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramiddrop.hf.images import group_tokens
from pyramiddrop.hf.plan import GeneralPlan, make_plan
from pyramiddrop.hf.prompt_masks import PromptMasks
from pyramiddrop.schedule import Schedule

SCHEDULE = Schedule.of([2, 4], [0.5, 0.25])


def mask(*rows: str) -> Tensor:
    return torch.tensor([[sign == "x" for sign in row] for row in rows])


def plan(
    visual: Tensor,
    queries: Tensor,
    protected: Tensor | None = None,
    valid: Tensor | None = None,
    lengths: list[int] | None = None,
    per_image: bool = False,
    schedule: Schedule = SCHEDULE,
) -> GeneralPlan:
    protected = queries if protected is None else protected
    grouping = "image" if per_image else "sample"
    visual = visual if valid is None else visual & valid
    groups = group_tokens(grouping, visual, torch.zeros_like(visual), lengths, None)
    return make_plan(PromptMasks(visual, queries, torch.zeros_like(visual), protected, valid, groups, 0), schedule)


def test_counts_and_lengths_of_a_ragged_batch() -> None:
    made = plan(mask("xxxxxxxx..", "..xxxx....", ".........."), mask(*[".........x"] * 3))
    assert [num_keep.flatten().tolist() for num_keep in made.num_keeps] == [[4, 2, 0], [2, 1, 0]]
    assert [drop.length for drop in made.drops] == [10, 10]  # the text-only row keeps the rectangle
    assert all(made.ragged)
    assert made.drops_any


def test_padding_counts_as_neither_row_nor_visual_token() -> None:
    valid = mask("..xxxxxxxx", "xxxxxxxxxx")
    made = plan(mask("xxxxxx....", "xxxxxx...."), mask(*[".........x"] * 2), valid=valid)
    assert made.visual.sum(1).tolist() == [4, 6]
    assert [num_keep.flatten().tolist() for num_keep in made.num_keeps] == [[2, 3], [1, 1]]
    assert [drop.length for drop in made.drops] == [7, 5]
    assert list(made.ragged) == [True, False]


def test_a_sample_that_asks_nothing_drops_nothing() -> None:
    made = plan(mask("xxxx..", "xxxx.."), mask(".....x", "......"))
    assert [num_keep.flatten().tolist() for num_keep in made.num_keeps] == [[2, 4], [1, 4]]


def test_protected_tokens_count_inside_the_quota_and_stretch_it_when_they_are_more() -> None:
    queries = mask("...x....")
    made = plan(mask("xxxx...."), queries, protected=mask("..xx...."))
    assert [num_keep.item() for num_keep in made.num_keeps] == [2, 2]


def test_full_keep_drops_nothing() -> None:
    made = plan(mask("xxxx.."), mask(".....x"), schedule=Schedule.of([2, 4], [1.0, 1.0]))
    assert not made.drops_any
    assert [drop.length for drop in made.drops] == [6, 6]


def test_query_columns_are_padded_with_no_weight() -> None:
    made = plan(mask("xx....", "xx...."), mask("...x.x", "....x."))
    assert made.queries[0].tolist() == [3, 5]
    assert made.queries[1, 0] == 4
    assert made.weights.tolist() == [[1, 1], [1, 0]]


def test_visual_tokens_are_numbered_from_zero_in_each_sample() -> None:
    made = plan(mask("..xx.x..", "xx......"), mask(*[".......x"] * 2))
    assert [row[eye].tolist() for row, eye in zip(made.token_index, made.visual, strict=True)] == [[0, 1, 2], [0, 1]]


def test_one_query_is_one_column() -> None:
    assert plan(mask("xx....", "xx...."), mask(".....x", "....x.")).queries.tolist() == [[5], [4]]


def test_reach_is_from_the_first_visual_to_the_last_query_token_where_that_is_most() -> None:
    assert plan(mask("..xx...."), mask(".......x")).reach == 6
    assert plan(mask("..xx....", "...x....", "........"), mask(*[".......x"] * 2, "x.......")).reach == 6
    assert plan(mask("........"), mask(".......x")).reach == 0


def test_images_have_their_own_quota() -> None:
    made = plan(mask("xxxxxx..xx.", "..xx......."), mask(*["..........x"] * 2), lengths=[4, 2, 2, 2], per_image=True)
    assert made.num_keeps[0].tolist() == [[2, 1, 1], [1, 0, 0]]
    assert made.groups[0][made.visual[0]].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert made.groups[1][made.visual[1]].tolist() == [0, 0]


def test_runs_are_images_where_lengths_are_unknown() -> None:
    made = plan(mask("xxxx..xx.."), mask(".........x"), per_image=True)
    assert made.num_keeps[0].tolist() == [[2, 1]]
