"""What an overlay shows: exactly the dropped patches are dimmed, and the panels follow the trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import save_picture
from pyramiddrop.report.pictures.overlay import mask_dropped, seen_pixels
from pyramiddrop.report.pictures.visual import Visual, check_picture_path, stage_tokens
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.views import PlacedView

VIEW = View("picture", rows=2, columns=3, box=Box(0, 0, 60, 40))


def hand_made_trace(columns: list[int], kept: dict[int, list[int]], layers: int = 8) -> Any:
    """A trace of one sample: the columns of its visual tokens, and for each stage's layer those that it keeps."""
    stages = [SimpleNamespace(layer=layer, kept=[torch.tensor(stay)]) for layer, stay in kept.items()]
    return SimpleNamespace(visual_columns=[torch.tensor(columns)], stages=stages, lengths=[len(columns)] * layers)


def test_spans_cut_the_layers_at_the_drops() -> None:
    trace = hand_made_trace([4, 5, 6, 7, 8, 9], {2: [4, 6, 9], 5: [6], 7: [6]})
    found = stage_tokens(trace, [VIEW])
    assert [(stage.first, stage.last, stage.tokens) for stage in found] == [(0, 1, 6), (2, 4, 3), (5, 6, 1), (7, 7, 1)]
    assert [stage.layers for stage in found] == ["layers 0-1", "layers 2-4", "layers 5-6", "layer 7"]
    assert found[1].cells == [{(0, 0), (0, 2), (1, 2)}]
    assert found[2].cells == [{(0, 2)}]


def test_spans_refuse_an_empty_trace_and_views_of_another_picture() -> None:
    with pytest.raises(ValueError, match="the trace is empty"):
        stage_tokens(SimpleNamespace(visual_columns=[]), [VIEW])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the views have 6 visual tokens; the trace has 5"):
        stage_tokens(hand_made_trace([4, 5, 6, 7, 8], {}), [VIEW])


@pytest.mark.parametrize("paint", [0, 60, 200, 255])
def test_exactly_the_pixels_of_dropped_patches_are_dimmed(tmp_path: Path, paint: int) -> None:
    colours = np.asarray(Image.open(save_picture(tmp_path / "p.png", 60, 40))) // 8 + paint * 7 // 8
    pixels = seen_pixels(Image.fromarray(colours.astype(np.uint8)), VIEW, long_side=60)
    trace = hand_made_trace([4, 5, 6, 7, 8, 9], {2: [4, 6, 9]})
    kept = stage_tokens(trace, [VIEW])[1].cells[0]
    before, after = np.asarray(pixels), np.asarray(mask_dropped(pixels, VIEW, kept))
    dropped = np.array([[False, True, False], [True, True, False]]).repeat(20, axis=0).repeat(20, axis=1)
    assert before.shape == (40, 60, 3)
    assert (before == after).all(axis=-1)[~dropped].all()
    assert (before != after).any(axis=-1)[dropped].all()
    difference = np.abs(before.astype(int) - after.astype(int)).mean(axis=-1)
    assert difference[dropped].min() > 40  # a person sees it


def test_what_sticks_out_of_the_picture_is_black_and_patches_are_whole_pixels() -> None:
    white = Image.new("RGB", (40, 40), "white")
    view = View("tiles", rows=2, columns=3, box=Box(-10, 0, 50, 40))
    pixels = np.asarray(seen_pixels(white, view, long_side=120))
    assert pixels.shape == (80, 120, 3)
    assert (pixels[:, :19] == 0).all()
    assert (pixels[:, 101:] == 0).all()
    assert (pixels[:, 21:99] == 255).all()


def test_a_part_of_the_picture_is_cut_out() -> None:
    picture = Image.new("RGB", (100, 60), "red")
    picture.paste("blue", (20, 0, 80, 60))
    pixels = np.asarray(seen_pixels(picture, View("picture", 4, 4, Box(20, 0, 80, 60)), long_side=240))
    assert pixels.shape == (240, 240, 3)
    assert (pixels == (0, 0, 255)).all()


def test_one_panel_a_view_and_span(tmp_path: Path) -> None:
    base = View("base", 2, 2, Box(0, 0, 90, 60))
    tiles = View("tiles", 2, 3, Box(0, 0, 90, 60), reading_order(2, 3, newline=True))
    trace = hand_made_trace(list(range(12)), {2: list(range(6)), 4: [1, 7]})
    picture = Image.open(save_picture(tmp_path / "p.png"))
    views = [PlacedView(picture, base), PlacedView(picture, tiles)]
    visual = Visual(views, stage_tokens(trace, [base, tiles]), [], "What? " * 40, "this")
    figure = visual.draw()
    assert len(figure.axes) == 6
    written = [text.get_text() for text in figure.texts]
    assert [text for text in written if text.startswith("layers")] == [
        "layers 0-1 · 12 tokens",
        "layers 2-3 · 6 tokens",
        "layers 4-7 · 2 tokens",
    ]
    assert {"base", "tiles", "answer: this"} <= set(written)
    visual.save(tmp_path / "overlay.png")
    assert Image.open(tmp_path / "overlay.png").width > 600


def test_an_overlay_needs_a_known_suffix_and_a_folder(tmp_path: Path) -> None:
    check_picture_path(tmp_path / "o.png")
    with pytest.raises(ValueError, match=r"by its suffix; got 'o\.odd'"):
        check_picture_path(tmp_path / "o.odd")
    with pytest.raises(ValueError, match="no folder"):
        check_picture_path(tmp_path / "nowhere" / "o.png")
