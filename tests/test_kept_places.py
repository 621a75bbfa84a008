"""Where kept tokens lie: by hand-made numbers, on one model by its own trace, and in the record of an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from pyramiddrop import Downsample, FastV, PyramidDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer, Place, batch_views, kept_places, mean_place
from pyramiddrop.evaluation.record import evaluation_record
from pyramiddrop.evaluation.run import EvalOptions, Evaluator
from pyramiddrop.evaluation.tasks import digits_task
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.report.tables.evaluation import eval_markdown
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.views import PlacedView
from pyramiddrop.trace import Trace

PICTURE = Image.new("RGB", (200, 100))
WHOLE = PlacedView(PICTURE, View("picture", 2, 4, Box(0, 0, 200, 100)))


@pytest.mark.parametrize(
    ("tokens", "place"),
    [
        (range(8), (0.5, 0.5)),
        ([0], (0.25, 0.125)),
        ([7], (0.75, 0.875)),
        ([4, 5], (0.75, 0.25)),
        ([0, 3, 4], (5 / 12, 3 / 8)),
    ],
)
def test_a_token_lies_at_the_middle_of_its_cell(tokens: Any, place: tuple[float, float]) -> None:
    assert mean_place([WHOLE], tokens) == pytest.approx(place)


def test_a_crop_lies_where_it_was_cut_and_a_newline_nowhere() -> None:
    lower_right = View("tile", 1, 2, Box(100, 50, 200, 100), reading_order(1, 2, newline=True))
    views = [WHOLE, PlacedView(PICTURE, lower_right)]
    assert mean_place(views, [8]) == pytest.approx((0.75, 0.625))
    assert mean_place(views, [9, 10]) == pytest.approx((0.75, 0.875))
    assert mean_place(views, [10]) is None is mean_place(views, [])


def trace_of(*kept: list[int]) -> Trace:
    """Of one prompt with eight visual tokens from column 3 on."""
    trace = Trace(visual_columns=[torch.arange(3, 11)])
    for layer, columns in enumerate(kept):
        trace.record(layer, 0.5, torch.tensor([columns], dtype=torch.long), None, 0)
    return trace


def test_the_last_drop_counts_and_before_an_early_exit_the_one_before() -> None:
    method = PyramidDrop()
    assert kept_places(trace_of([3, 4, 7], [7]), method, [[WHOLE]]) == [Place(0.75, 0.125)]
    assert kept_places(trace_of([10], []), method, [[WHOLE]]) == [Place(0.75, 0.875)]
    assert kept_places(trace_of([10]), method, [[]]) == [None]
    assert kept_places(trace_of([10]), method, [[WHOLE, WHOLE]]) == [None]  # not the tokens of these views
    for smaller in (Downsample(), Downsample() | PyramidDrop()):
        assert kept_places(trace_of([10]), smaller, [[WHOLE]]) == [None]


def test_rows_of_the_processor_go_to_their_prompts() -> None:
    class Config:
        model_type = "qwen2_vl"

    class Processor:
        class image_processor:
            merge_size = 2

    grids = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4]])
    pictures = [[PICTURE], [PICTURE, PICTURE]]
    one, two = batch_views(Config(), Processor(), pictures, {"image_grid_thw": grids, "input_ids": torch.zeros(2, 9)})
    assert [(seen.view.rows, seen.view.columns) for seen in (*one, *two)] == [(2, 2), (2, 4), (4, 2)]
    assert batch_views(Config(), Processor(), pictures, {"image_grid_thw": grids[:2]}) == [(), ()]


def test_an_evaluation_says_where_the_tokens_lie() -> None:
    task = digits_task(limit=3)
    options = EvalOptions(("fastv:layer=1,keep=0.1", "downsample"), batch=2, max_new_tokens=1, rounds=0, device="cpu")
    record = evaluation_record(Evaluator(task, options).run())
    vanilla, fastv, smaller = (variant["kept_place"] for variant in record["methods"])
    assert vanilla is None is smaller
    answerer = Answerer(load_checkpoint(digits_checkpoint(), "cpu"), max_new_tokens=1)
    expected = []
    for sample in task.samples:
        with FastV(layer=1, keep=0.1)(answerer.checkpoint.model) as trace:
            inputs = answerer.inputs([sample])
            answerer.checkpoint.model(**inputs)
        numbers = trace.stages[-1].kept[0] - trace.visual_columns[0][0]  # 8 x 8 tokens in reading order
        expected.append([(numbers // 8 + 0.5).mean().item() / 8, (numbers % 8 + 0.5).mean().item() / 8])
    assert list(fastv.values()) == pytest.approx(torch.tensor(expected).mean(0).tolist())
    shown = f"{100 * fastv['row']:.0f} %, {100 * fastv['column']:.0f} %"
    assert "kept tokens, down, across" in eval_markdown(record)
    assert shown in eval_markdown(record)
