"""The page of `visualize` in a real browser: what it paints is what the trace kept, and every way to use it works."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from browser import act, needs_browser
from pyramiddrop.report import Visual
from pyramiddrop.report.pictures.overlay import Scored, draw_heatmap, mask_dropped, seen_pixels
from pyramiddrop.report.pictures.visual import stage_tokens
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order, unplaced_by_name
from pyramiddrop.report.token_layout.views import PlacedView

#: Six tokens of a picture, then a view of two rows with newline tokens.
VIEWS = [
    View("base", 2, 3, Box(0, 0, 60, 40)),
    View("tiles", 2, 2, Box(0, 0, 60, 40), reading_order(2, 2, newline=True), ((1,), ())),
]
KEPT = {2: [0, 2, 5, 6, 10], 5: [5, 6]}
SCORES = {
    2: [0.5, 0.1, 0.3, 0.01, 0.02, 0.9, 0.8, 0.03, 0.04, 0.05, 0.31, 0.06],
    5: [0.2, math.nan, 0.1, math.nan, math.nan, 0.7, 0.6, math.nan, math.nan, math.nan, 0.3, math.nan],
}
#: Reads the middle of each cell of the first picture, by rows.
READ = """
const read = (number, rows, columns) => {
  const canvas = document.querySelectorAll("canvas")[number], context = canvas.getContext("2d"), found = [];
  for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
    const x = Math.floor((column + .5) * canvas.width / columns), y = Math.floor((row + .5) * canvas.height / rows);
    found.push([...context.getImageData(x, y, 1, 1).data].slice(0, 3));
  }
  return found;
};
const choose = (name, value) => document.querySelector(`input[name=${name}][value="${value}"]`).click();
const said = () => document.getElementById("said").textContent;
"""


@pytest.fixture(scope="module")
def visual() -> Visual:
    stages = [SimpleNamespace(layer=layer, kept=[torch.tensor(kept)]) for layer, kept in KEPT.items()]
    trace: Any = SimpleNamespace(visual_columns=[torch.arange(12)], stages=stages, lengths=[12] * 8)
    colours = np.full((40, 60, 3), 90, dtype=np.uint8)
    colours[:20, 20:40] = (200, 30, 30)
    seen = [PlacedView(Image.fromarray(colours), view) for view in VIEWS]
    scored = [Scored(layer, VIEWS, torch.tensor(scores)) for layer, scores in SCORES.items()]
    return Visual(seen, stage_tokens(trace, VIEWS), scored, "What is <b>red</b>?", "A & B", "a model under a method")


def test_the_page_needs_no_network_and_escapes_what_it_shows(visual: Visual) -> None:
    page = visual.html()
    assert not re.search(r"https?://|//cdn|@import|<link|<iframe|src=", page)
    assert "<b>red</b>" not in page
    for text in ("What is &lt;b&gt;red&lt;/b&gt;?", "A &amp; B", "a model under a method"):
        assert text in page


@needs_browser
def test_a_notebook_shows_the_page_in_a_frame_that_works(visual: Visual, tmp_path: Path) -> None:
    script = """
    const page = document.querySelector("iframe").contentDocument;
    page.querySelector("input[name=stage][value='2']").click();
    return [page.querySelectorAll("canvas").length, page.body.textContent.includes("What is <b>red</b>?")];
    """
    assert act(f"<body>{visual._repr_html_()}</body>", script, tmp_path) == [len(VIEWS), True]


@needs_browser
def test_each_stage_veils_what_was_dropped_before_it(visual: Visual, tmp_path: Path) -> None:
    script = (
        READ
        + """
    const found = [];
    for (const stage of [0, 1, 2]) { choose("stage", stage); found.push(read(0, 2, 3)); }
    return found;
    """
    )
    found = act(visual.html(), script, tmp_path)
    pixels = seen_pixels(visual.seen[0].picture, VIEWS[0])
    for stage, colours in zip(visual.stages, found, strict=True):
        assert _close(colours, _middles(mask_dropped(pixels, VIEWS[0], stage.cells[0]), VIEWS[0]))


@needs_browser
def test_tokens_without_a_place_are_counted_by_name(visual: Visual, tmp_path: Path) -> None:
    assert [dict(stage.unplaced) for stage in visual.stages] == [{"row ends": 2}, {}, {}]
    script = (
        READ
        + """
    const found = [];
    const counts = document.getElementById("unplaced");
    for (const stage of [0, 1, 2]) { choose("stage", stage); found.push(counts.textContent); }
    return found;
    """
    )
    assert act(visual.html(), script, tmp_path) == ["2 of 2 row ends", "0 of 2 row ends", "0 of 2 row ends"]


def test_tokens_without_a_place_are_called_by_where_they_stand() -> None:
    view = View("tiles", 2, 2, Box(0, 0, 9, 9), (None, *reading_order(2, 2, newline=True), (0, 0), None))
    assert unplaced_by_name([VIEWS[0], view], range(15)) == {"start tokens": 1, "row ends": 2, "others": 1}
    assert unplaced_by_name([VIEWS[0], view], [0, 7, 9]) == {"row ends": 1}


@needs_browser
def test_scores_are_painted_by_rank_as_in_the_figure(visual: Visual, tmp_path: Path) -> None:
    script = (
        READ
        + """
    choose("paint", "scores");
    const found = [];
    for (const stage of [0, 1]) { choose("stage", stage); found.push(read(0, 2, 3)); }
    return found;
    """
    )
    pixels = seen_pixels(visual.seen[0].picture, VIEWS[0])
    for stage, colours in zip(visual.scored, act(visual.html(), script, tmp_path), strict=True):
        painted = draw_heatmap(pixels, VIEWS[0], stage.ranks[0], stage.tokens)
        assert _close(colours, _middles(painted, VIEWS[0]), within=12)  # the page has 32 colours


@needs_browser
def test_the_pointer_and_the_arrow_keys_tell_the_fate_and_the_scores(visual: Visual, tmp_path: Path) -> None:
    script = (
        READ
        + """
    const [base, tiles] = document.querySelectorAll("canvas"), box = base.getBoundingClientRect(), found = [];
    const point = (x, y) => base.dispatchEvent(new PointerEvent("pointermove",
      {clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
    found.push(said());
    point(5 / 6, 3 / 4); found.push(said());
    point(1 / 6, 1 / 4); found.push(said());
    base.dispatchEvent(new PointerEvent("pointerleave")); found.push(said());
    const press = key => tiles.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
    press("ArrowRight"); press("ArrowDown"); press("ArrowDown"); found.push(said());
    return found;
    """
    )
    hint, kept, dropped, left, tile = act(visual.html(), script, tmp_path)
    assert hint == left
    assert kept == (
        "base, row 2, column 3, token 6: kept to the end · score before layer 2: 0.9, rank 1 of 12"
        " · score before layer 5: 0.7, rank 1 of 5"
    )
    assert dropped.startswith("base, row 1, column 1, token 1: dropped before layer 5 · score before layer 2: 0.5, ")
    assert tile == (
        "tiles, row 2, column 2, token 11: dropped before layer 5 · score before layer 2: 0.31, rank 4 of 12"
        " · score before layer 5: 0.3, rank 3 of 5"
    )


@needs_browser
def test_it_opens_on_the_first_stage_plays_once_and_stops_where_one_is_chosen(visual: Visual, tmp_path: Path) -> None:
    script = (
        READ
        + """
    const stage = () => document.querySelector("input[name=stage]:checked").value, found = [stage()];
    const play = document.getElementById("play");
    for (let step = 0; step < 4; step++) { await wait(1200); found.push(stage()); }
    found.push(play.textContent);
    play.click(); found.push(stage(), play.textContent);
    choose("stage", 1); await wait(3000);
    return [found.join(" "), stage(), play.textContent, play.getAttribute("aria-pressed")];
    """
    )
    assert act(visual.html(), script, tmp_path) == ["0 1 2 2 2 Play 0 Pause", "1", "Play", "false"]


@needs_browser
def test_every_control_has_a_name_and_counts_are_said(visual: Visual, tmp_path: Path) -> None:
    script = (
        READ
        + """
    choose("stage", 1);
    const unnamed = [...document.querySelectorAll("input, button, canvas")].filter(
      one => !(one.getAttribute("aria-label") || one.closest("label")?.textContent.trim() || one.textContent.trim()));
    return [unnamed.length, [...document.querySelectorAll("canvas")].map(one => one.getAttribute("aria-label"))];
    """
    )
    assert act(visual.html(), script, tmp_path) == [
        0,
        [
            "base: 3 of 6 visual tokens are there in layers 2-4",
            "tiles: 2 of 4 visual tokens are there in layers 2-4",
        ],
    ]


@needs_browser
def test_nothing_is_wider_than_a_phone(visual: Visual, tmp_path: Path) -> None:
    script = """
    document.documentElement.style.width = "340px";
    await wait(100);
    return Math.max(...[...document.querySelectorAll("main *")].map(one => one.getBoundingClientRect().right));
    """
    assert act(visual.html(), script, tmp_path) <= 340


@needs_browser
def test_dark_where_the_reader_wants_it_dark(visual: Visual, tmp_path: Path) -> None:
    script = "return getComputedStyle(document.body).backgroundColor;"
    light = act(visual.html(), script, tmp_path)
    dark = act(visual.html(), script, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert _brightness(light) > 200
    assert _brightness(dark) < 60


def _brightness(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


def _middles(pixels: Image.Image, view: View) -> list[list[int]]:
    values = np.asarray(pixels)
    height, width = values.shape[0] // view.rows, values.shape[1] // view.columns
    return values[height // 2 :: height, width // 2 :: width].reshape(-1, 3).astype(int).tolist()


def _close(found: list[list[int]], expected: list[list[int]], within: int = 3) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= within)
