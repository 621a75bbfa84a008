"""Pictures of a prefill: colours follow the scores, gone tokens look gone, every format is what its suffix says."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyramiddrop.assets import digits_checkpoint, digits_images, digits_questions
from pyramiddrop.inference.request import Request, prepare, run
from pyramiddrop.report import Visual, visualize
from pyramiddrop.report.pictures import figure_grid
from pyramiddrop.report.pictures.overlay import Scored, draw_heatmap, mask_dropped, seen_pixels, with_seams
from pyramiddrop.report.pictures.visual import stage_tokens
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order, values_by_view
from pyramiddrop.report.token_layout.views import PlacedView

GONE = math.nan


@pytest.fixture(scope="module")
def drawn() -> tuple[Any, Visual]:
    """The trace of the small model's answer about two of its pictures, and what is drawn of it."""
    paths = digits_images()[:2]
    ready = prepare(Request(digits_questions()[paths[0].name][0]["question"], paths, str(digits_checkpoint())))
    done = run(ready, 4)
    config, processor = ready.checkpoint.model.config, ready.checkpoint.processor
    assert done.trace is not None
    return done.trace, visualize(done.trace, config, processor, ready.pictures, ready.inputs, "Q", done.answer)


def test_colours_follow_the_scores_and_gone_tokens_are_veiled() -> None:
    view = View("picture", 2, 2, Box(0, 0, 40, 40))
    pixels = Image.new("RGB", (40, 40), (200, 200, 200))
    scored = Scored(1, [view], torch.tensor([0.1, 0.9, GONE, 0.5]))
    found = np.asarray(draw_heatmap(pixels, view, scored.ranks[0], scored.tokens)).astype(int)
    low, high, middle = (found[y, x].sum() for y, x in ((10, 10), (10, 30), (30, 30)))
    assert low < middle < high
    veiled = np.asarray(mask_dropped(pixels, view, [(0, 0), (0, 1), (1, 1)]))
    assert (found[20:, :20] == veiled[20:, :20]).all()
    assert all((found[y : y + 20, x : x + 20] == found[y, x]).all() for y in (0, 20) for x in (0, 20))


def test_ranks_count_every_token_that_was_there_and_ties_share_the_better_one() -> None:
    view = View("picture", 1, 5, Box(0, 0, 5, 1), reading_order(1, 5, leading=1))
    scored = Scored(1, [view], torch.tensor([0.9, 0.2, 0.2, GONE, 0.1, 0.5]))
    assert scored.tokens == 5
    assert str(scored.ranks[0]) == str([[3.0, 3.0, GONE, 5.0, 2.0]])
    assert scored.at((0, 0.5, 1)) == pytest.approx([0.1, 0.2, 0.9])


def test_values_stand_where_their_tokens_do() -> None:
    first = View("a", 1, 2, Box(0, 0, 2, 1), reading_order(1, 2, leading=1))
    views = [first, View("b", 2, 1, Box(0, 0, 1, 2), reading_order(2, 1, newline=True))]
    assert values_by_view(views, [9, 1, 2, 3, 9, 4, 9]) == [[[1, 2]], [[3], [4]]]
    with pytest.raises(ValueError, match="have 7 visual tokens; there are 2 values"):
        values_by_view(views, [1, 2])


def test_every_stage_and_picture_is_there_and_the_best_scores_are_those_kept(drawn: tuple[Any, Visual]) -> None:
    trace, visual = drawn
    assert [one.view.name for one in visual.seen] == ["picture 1", "picture 2"]
    assert [stage.layer for stage in visual.scored] == [stage.layer for stage in trace.stages]
    for stage, (before, after) in zip(visual.scored, pairwise(visual.stages), strict=True):
        kept: list[float] = []
        dropped: list[float] = []
        for grid, here, there in zip(stage.scores, before.cells, after.cells, strict=True):
            places = {
                (row, column) for row, line in enumerate(grid) for column, value in enumerate(line) if value == value
            }
            assert places == here  # NaN exactly where a token was gone
            kept += [grid[row][column] for row, column in there]
            dropped += [grid[row][column] for row, column in here - there]
        assert min(kept) >= max(dropped)


def test_what_json_says_is_what_the_trace_kept(drawn: tuple[Any, Visual]) -> None:
    trace, visual = drawn
    found = visual.as_dict()
    assert [stage["tokens"] for stage in found["kept"]] == [128, *(len(stage.kept[0]) for stage in trace.stages)]
    assert all(sum(stage["placed"].values()) == stage["tokens"] for stage in found["kept"])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_are_what_their_suffix_says(drawn: tuple[Any, Visual], tmp_path: Path, suffix: str) -> None:
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for scores in (False, True):
        path = tmp_path / f"{scores}.{suffix}"
        drawn[1].save(path, scores=scores)
        assert path.read_bytes().startswith(starts[suffix])
    assert (tmp_path / f"True.{suffix}").read_bytes() != (tmp_path / f"False.{suffix}").read_bytes()


def test_a_gif_steps_through_the_stages_and_gets_greyer(drawn: tuple[Any, Visual], tmp_path: Path) -> None:
    drawn[1].save(tmp_path / "kept.gif")
    with Image.open(tmp_path / "kept.gif") as gif:
        assert gif.n_frames == len(drawn[1].stages)  # type: ignore[attr-defined]
        frames = []
        for number in range(len(drawn[1].stages)):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    changed = [int((abs(frame - frames[0]) > 40).any(-1).sum()) for frame in frames]  # each has colours of its own
    assert changed == sorted(changed)
    assert changed[1] > 0


def test_what_cannot_be_drawn_says_so(drawn: tuple[Any, Visual], tmp_path: Path) -> None:
    visual = drawn[1]
    for path, scores, message in (
        (tmp_path / "x.odd", False, "by its suffix"),
        (tmp_path / "no" / "x.gif", False, "no folder"),
        (tmp_path / "x.gif", True, "no picture of the scores alone"),
    ):
        with pytest.raises(ValueError, match=message):
            visual.save(path, scores=scores)
    unranked = Visual(visual.seen, visual.stages, [])
    with pytest.raises(ValueError, match="no stage of this run ranked a token"):
        unranked.draw_scores()


def test_tokens_of_a_family_without_places_are_drawn_in_the_order_of_the_prompt() -> None:
    columns, kept = torch.arange(3, 10), torch.tensor([3, 9])
    stage = SimpleNamespace(layer=1, kept=[kept], scores=[torch.arange(7.0)])
    trace: Any = SimpleNamespace(
        visual_columns=[columns], visual_tokens=[7], stages=[stage], lengths=[8, 6], has_sizes=False
    )
    found = visualize(trace, SimpleNamespace(model_type="qwen9"), None, [])
    assert "model type 'qwen9'" in found.note
    view = found.seen[0].view
    assert (view.rows, view.columns, view.tokens) == (2, 4, 7)
    assert found.stages[1].cells == [{(0, 0), (1, 2)}]
    pixels = np.asarray(seen_pixels(found.seen[0].picture, view, 8))
    dimmed = np.asarray(mask_dropped(Image.fromarray(pixels), view, found.stages[1].cells[0]))
    changed = (pixels != dimmed).any(-1)[::2, ::2]
    assert changed.tolist() == [[False, True, True, True], [True, True, False, False]]  # the last cell has no token


def test_a_line_stands_where_another_crop_begins() -> None:
    view = View("tiles", 2, 3, Box(0, 0, 30, 20), seams=((1,), (2,)))
    grey = Image.new("RGB", (30, 20), (90, 90, 90))
    changed = (np.asarray(with_seams(grey, view)) != 90).any(-1)
    expected = np.zeros((20, 30), dtype=bool)
    expected[10] = expected[:, 20] = True
    assert (changed == expected).all()


def test_another_sample_of_the_batch_is_drawn_by_its_own_tokens() -> None:
    columns = [torch.arange(3, 7), torch.arange(3, 7)]
    kept, scores = [torch.tensor([3, 4]), torch.tensor([6])], [torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 3.0])]
    stage = SimpleNamespace(layer=1, kept=kept, scores=scores)
    trace: Any = SimpleNamespace(visual_columns=columns, stages=[stage], lengths=[8, 6], has_sizes=False)
    merging = SimpleNamespace(image_processor=SimpleNamespace(merge_size=2))
    config = SimpleNamespace(model_type="qwen2_vl")
    picture = Image.new("RGB", (8, 8))
    found = visualize(trace, config, merging, [picture], {"image_grid_thw": [(1, 4, 4)]}, sample=1)
    assert found.stages[1].cells == [{(1, 1)}]
    assert found.scored[0].scores == [[[0.0, 1.0], [2.0, 3.0]]]


@pytest.fixture
def clip() -> Visual:
    """Ten frames, red and darker to the end, of two tokens each; the left one is dropped before layer 4."""
    views = [View(f"frame {number}", 1, 2, Box(0, 0, 20, 10)) for number in range(1, 11)]
    pictures = [Image.new("RGB", (20, 10), (250 - 20 * number, 0, 0)) for number in range(10)]
    seen = [
        PlacedView(picture, view, moment) for moment, (picture, view) in enumerate(zip(pictures, views, strict=True))
    ]
    stage = SimpleNamespace(layer=4, kept=[torch.arange(1, 20, 2)])
    trace: Any = SimpleNamespace(visual_columns=[torch.arange(20)], stages=[stage], lengths=[20] * 8)
    return Visual(seen, stage_tokens(trace, views), [Scored(4, views, torch.arange(20.0))], "What?", "That.")


def test_a_video_becomes_a_contact_sheet(clip: Visual) -> None:
    figure = clip.draw()
    assert len(figure.axes) == 20
    first, ninth, dimmed = (figure.axes[place].get_position() for place in (0, 8, 10))
    assert first.x0 == pytest.approx(ninth.x0)  # eight frames a line
    assert first.y0 > ninth.y0 > dimmed.y0  # the next stage stands below
    written = [text.get_text() for text in figure.texts]
    assert [text for text in written if text.startswith("layers")] == [
        "layers 0-3 · 20 tokens",
        "layers 4-7 · 10 tokens",
    ]
    assert written.count("frame 7") == 2
    assert len(clip.draw_scores().axes) == 11  # and a colour bar


def test_a_gif_of_a_video_plays_its_frames_and_shows_the_stages_side_by_side(clip: Visual, tmp_path: Path) -> None:
    clip.save(tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 10  # type: ignore[attr-defined]
        frames = []
        for number in range(10):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    side = 448  # pixels of a panel, and there is a gap between the two
    for number, frame in enumerate(frames):
        all_kept, left, right = (
            frame[figure_grid.HEAD + 50, x] for x in (10, side + figure_grid.SPACE + 10, 2 * side - 10)
        )
        assert abs(all_kept - [250 - 20 * number, 0, 0]).max() < 12
        assert abs(right - all_kept).max() < 12
        assert abs(left - all_kept).max() > 40
