"""What a prompt alone decides, as the scheduler and the workers both read it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import AttentionScorer
from pyramiddrop.vllm.batch import Batch, Entry, Step, Waiting
from pyramiddrop.vllm.prompts import read_prompt
from pyramiddrop.vllm.rules import Rules


def rules(keep: tuple[float, ...] = (0.5, 0.25), per_image: bool = False) -> Rules:
    schedule = Schedule.of(range(2, 2 + len(keep)), keep)
    return Rules(schedule, AttentionScorer(), "next", per_image)


def feature(offset: int, length: int, is_embed: list[bool] | None = None, modality: str = "image") -> Any:
    embedded = None if is_embed is None else torch.tensor(is_embed)
    place = SimpleNamespace(offset=offset, length=length, is_embed=embedded)
    return SimpleNamespace(modality=modality, mm_position=place)


def test_counts_are_those_of_the_schedule() -> None:
    prompt = read_prompt([feature(3, 10), feature(20, 5)], 30, rules())
    assert prompt is not None
    assert prompt.columns.tolist() == [*range(3, 13), *range(20, 25)]
    assert prompt.quota == ((7,), (3,))  # the floor of 15 / 2 and of 15 / 4
    assert prompt.dropped == (0, 8, 12)


def test_each_image_has_its_own_quota_where_that_is_asked_for() -> None:
    prompt = read_prompt([feature(3, 10), feature(20, 5)], 30, rules(per_image=True))
    assert prompt is not None
    assert prompt.quota == ((5, 2), (2, 1))
    assert prompt.groups.tolist() == [0] * 10 + [1] * 5
    assert prompt.dropped == (0, 8, 12)


def test_separators_within_an_image_are_text() -> None:
    prompt = read_prompt([feature(1, 5, [True, True, False, True, True])], 8, rules())
    assert prompt is not None
    assert prompt.columns.tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "features",
    [None, [], [feature(0, 9, modality="audio")], [feature(4, 1)]],
    ids=["none", "empty", "audio", "one token"],
)
def test_nothing_to_drop_is_no_visual_prompt(features: Any) -> None:
    assert read_prompt(features, 10, rules()) is None


def test_keep_all_drops_nothing() -> None:
    assert read_prompt([feature(3, 10)], 30, rules((1.0, 1.0))) is None


def entry(computed: int, scheduled: int) -> Entry:
    prompt = read_prompt([feature(3, 10)], 20, rules())
    return Entry("a", prompt, computed, scheduled)


def test_rows_of_a_prompt_in_one_step() -> None:
    whole = entry(0, 20)
    assert (whole.visits, whole.finishes) == (True, True)
    assert [whole.rows(stage) for stage in range(3)] == [20, 15, 12]
    assert [whole.missing(stage) for stage in range(3)] == [0, 5, 8]


def test_rows_of_a_part_that_is_not_the_last() -> None:
    part = entry(8, 8)
    assert (part.visits, part.finishes) == (True, False)
    assert [part.rows(stage) for stage in range(3)] == [8, 0, 0]
    assert [part.missing(stage) for stage in range(3)] == [0, 16, 16]  # its sequences are empty there


def test_rows_of_the_last_part() -> None:
    last = entry(16, 4)
    assert [last.rows(stage) for stage in range(3)] == [4, 15, 12]
    assert [last.missing(stage) for stage in range(3)] == [0, 5, 8]


def test_rows_of_decoding() -> None:
    token = entry(23, 1)
    assert (token.visits, token.finishes) == (False, False)
    assert [token.rows(stage) for stage in range(3)] == [1, 1, 1]
    assert [token.missing(stage) for stage in range(3)] == [0, 5, 8]


def test_rows_of_a_resumed_request_hold_what_it_had_generated() -> None:
    resumed = entry(0, 26)
    assert [resumed.rows(stage) for stage in range(3)] == [26, 21, 18]


def test_text_is_never_touched() -> None:
    text = Entry("t", None, 0, 9)
    assert (text.visits, [text.rows(stage) for stage in range(3)]) == (False, [9, 9, 9])
    assert not Step([text]).misses


def test_a_prompt_that_begins_anew_has_nothing_left_of_its_parts() -> None:
    batch = Batch()
    batch.waiting["a"] = Waiting(torch.zeros(8, 4), torch.arange(8), None)
    batch.begin([entry(8, 8)])
    assert "a" in batch.waiting
    batch.begin([entry(0, 8)])
    assert not batch.waiting
