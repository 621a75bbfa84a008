"""What a prompt alone decides, as the scheduler and the workers both read it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import AttentionScorer
from pyramiddrop.vllm.batch import Batch, ScheduledRequest, Step
from pyramiddrop.vllm.prefix_rows import RecordedBlocks, Rows
from pyramiddrop.vllm.prompts import read_prompt
from pyramiddrop.vllm.rules import Rules, rules_for


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
    assert prompt.num_keep == ((7,), (3,))  # the floor of 15 / 2 and of 15 / 4
    assert prompt.dropped == (0, 8, 12)


def test_each_image_has_its_own_quota_where_that_is_asked_for() -> None:
    prompt = read_prompt([feature(3, 10), feature(20, 5)], 30, rules(per_image=True))
    assert prompt is not None
    assert prompt.num_keep == ((5, 2), (2, 1))
    assert prompt.groups.tolist() == [0] * 10 + [1] * 5
    assert prompt.dropped == (0, 8, 12)


def test_an_exit_keeps_no_visual_token_but_one_that_asks() -> None:
    prompt = read_prompt([feature(3, 10), feature(20, 5)], 30, rules((0.5, 0.0)))
    assert prompt is not None
    assert prompt.num_keep == ((7,), (0,))
    assert prompt.dropped == (0, 8, 15)
    prompt = read_prompt([feature(3, 10), feature(20, 5)], 25, rules((0.5, 0.0), per_image=True))
    assert prompt is not None
    assert prompt.num_keep == ((5, 2), (0, 1))
    assert prompt.dropped == (0, 8, 14)


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


def entry(computed: int, scheduled: int) -> ScheduledRequest:
    prompt = read_prompt([feature(3, 10)], 20, rules())
    return ScheduledRequest("a", prompt, computed, scheduled)


def test_rows_of_a_prompt_in_one_step() -> None:
    whole = entry(0, 20)
    assert (whole.has_visual, whole.finishes) == (True, True)
    assert [whole.rows(stage) for stage in range(3)] == [20, 15, 12]
    assert [whole.num_dropped(stage) for stage in range(3)] == [0, 5, 8]


def test_rows_of_a_part_that_is_not_the_last() -> None:
    part = entry(8, 8)
    assert (part.has_visual, part.finishes) == (True, False)
    assert [part.rows(stage) for stage in range(3)] == [8, 0, 0]
    assert [part.num_dropped(stage) for stage in range(3)] == [0, 16, 16]  # its sequences are empty there


def test_rows_of_the_last_part() -> None:
    last = entry(16, 4)
    assert [last.rows(stage) for stage in range(3)] == [4, 15, 12]
    assert [last.num_dropped(stage) for stage in range(3)] == [0, 5, 8]


def test_rows_of_decoding() -> None:
    token = entry(23, 1)
    assert (token.has_visual, token.finishes) == (False, False)
    assert [token.rows(stage) for stage in range(3)] == [1, 1, 1]
    assert [token.num_dropped(stage) for stage in range(3)] == [0, 5, 8]


def test_rows_of_a_resumed_request_hold_what_it_had_generated() -> None:
    resumed = entry(0, 26)
    assert [resumed.rows(stage) for stage in range(3)] == [26, 21, 18]


def test_text_is_never_touched() -> None:
    text = ScheduledRequest("t", None, 0, 9)
    assert (text.has_visual, [text.rows(stage) for stage in range(3)]) == (False, [9, 9, 9])
    assert not Step([text]).drops


def begin(batch: Batch, *entries: ScheduledRequest) -> Any:
    """A step of `entries`, described to `batch` as the runners do; the step."""
    columns: Any = zip(*((one.request, one.prompt, one.computed, one.scheduled) for one in entries), strict=True)
    requests, prompts, computed, scheduled = columns
    batch.begin(requests, prompts, np.array(computed), np.array(scheduled))
    return batch.step


def test_a_prompt_that_begins_anew_has_nothing_left_of_its_parts() -> None:
    batch = Batch()
    batch.waiting["a"] = Rows(torch.zeros(8, 4), torch.arange(8), None)
    begin(batch, entry(8, 8))
    assert "a" in batch.waiting
    begin(batch, entry(0, 8))
    assert not batch.waiting


def test_a_single_token_of_a_visual_prompt_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a single token of the prompt of a is scheduled"):
        begin(Batch(), entry(8, 1))
    begin(Batch(), entry(23, 1))  # a step of decoding


def test_decoding_the_same_requests_is_described_once() -> None:
    batch, first, text = Batch(), entry(23, 1), ScheduledRequest("t", None, 4, 1)
    other = replace(first, prompt=replace(first.prompt))
    step = begin(batch, first, text)
    assert step.decodes
    assert step.num_dropped(2, torch.device("cpu")).tolist() == [8, 0]
    on = replace(first, computed=24), replace(text, computed=5)
    assert begin(batch, *on) is step
    assert begin(batch, *on[::-1]) is not step, "another order"
    for changed in (
        [on[0]],
        [on[0], replace(text, scheduled=2)],
        [replace(other, computed=24), on[1]],
        [replace(first, computed=0, scheduled=20), on[1]],
    ):
        step = begin(batch, first, text)
        assert begin(batch, *changed) is not step
        assert [(one.computed, one.scheduled) for one in batch.step.entries] == [
            (one.computed, one.scheduled) for one in changed
        ]


def test_a_prompt_is_never_described_as_decoding() -> None:
    batch = Batch()
    assert not begin(batch, entry(0, 20)).decodes
    assert not begin(batch, ScheduledRequest("t", None, 0, 9)).decodes
    step = begin(batch, entry(20, 1))
    assert step.decodes
    with pytest.raises(RuntimeError, match="a single token"):
        begin(batch, replace(step.entries[0], computed=0))


def block(number: int, content: str) -> Any:
    return SimpleNamespace(block_id=number, block_hash=content)


def test_rows_are_there_from_the_next_step_on_until_others_take_their_place() -> None:
    recorded, blocks = RecordedBlocks(3), [block(5, "a"), block(7, "b")]
    recorded.add(blocks, step=1)
    assert recorded.usable(blocks, step=1) == 0
    assert recorded.usable(blocks, step=2) == 2
    assert recorded.usable([*blocks, block(9, "c")], step=2) == 2, "a block that was not recorded"
    assert recorded.usable([block(5, "other"), block(7, "b")], step=2) == 0, "a block that was written again"
    assert recorded.add([block(1, "x"), block(2, "y")], step=2) == set()
    assert recorded.usable(blocks, step=2) == 2, "this step's requests read before it records"
    assert recorded.usable(blocks, step=3) == 0, "four blocks were recorded, and three are held"
    assert recorded.usable([block(1, "x"), block(2, "y")], step=3) == 2
    assert recorded.add([block(3, "z")], step=3) == {5, 7}


def test_more_blocks_in_one_step_than_are_held_are_no_use() -> None:
    recorded, blocks = RecordedBlocks(3), [block(number, str(number)) for number in range(4)]
    recorded.add(blocks[:2], step=1)
    recorded.add(blocks[2:], step=1)
    assert recorded.usable(blocks, step=2) == 0


@pytest.mark.parametrize(
    ("asked", "keep"),
    [(0.4, (0.4, pytest.approx(0.16))), ([0.9, 0.1], (0.9, 0.1)), ("off", (1.0, 1.0)), (1, (1, 1))],
)
def test_a_request_may_keep_more_or_less(asked: Any, keep: Any) -> None:
    params = SimpleNamespace(extra_args={"pyramiddrop": asked, "other": 1})
    own = rules_for(rules(), params)
    assert own.schedule.keep == keep
    assert own.schedule.layers == rules().schedule.layers


@pytest.mark.parametrize("params", [None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1})])
def test_without_a_word_the_engine_s_rules_hold(params: Any) -> None:
    engine = rules()
    assert rules_for(engine, params) is engine


@pytest.mark.parametrize(
    "asked", [0, 1.5, -1, "on", "0.5", True, [0.5], [0.5, 0.7], [0.5, 0.0, 0.1], ["a", "b"], [2, 1]]
)
def test_what_a_request_cannot_ask_is_refused(asked: Any) -> None:
    with pytest.raises(
        ValueError, match=r"vllm_xargs\['pyramiddrop'\] must be a λ in \(0, 1\], a list of 2 keep ratios"
    ):
        rules_for(rules(), SimpleNamespace(extra_args={"pyramiddrop": asked}))
