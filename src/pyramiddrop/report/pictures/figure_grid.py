"""Figures of panels: a table of views and stages, or the contact sheet of a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

#: Inches: the side of a panel of a still and of a video frame, the gap between panels, the margin of the figure, the
#: height of a line of text, and the height of a colour bar with its labels.
STILL, FRAME, GAP, MARGIN, LINE, BAR = 2.6, 1.3, 0.1, 0.12, 0.24, 0.42
#: The largest ratio of a panel's height to its width.
TALLEST = 1.25
#: Frames of a video in a line, and the smallest width of a figure in inches, for its title.
FRAMES, NARROWEST = 8, 5.0


@dataclass(frozen=True)
class Scale:
    """A colour bar: the name of its colour map, and its labels at equal distances from left to right."""

    colours: str
    ticks: Sequence[str]


@dataclass(frozen=True)
class Stage:
    """One stage of a figure: its heading, and the pixels of each view."""

    head: str
    panels: Sequence[Image.Image]
    scale: Scale | None = None


class _Page:
    """A figure that is filled from the top; all lengths are inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=160)

    def picture(self, pixels: Image.Image, left: float, down: float, width: float, height: float) -> None:
        axis = self.figure.add_axes(self._box(left, down, width, height))
        axis.imshow(pixels, aspect="auto")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color("#999")

    def scale(self, scale: Scale, left: float, down: float, width: float) -> None:
        axis = self.figure.add_axes(self._box(left, down, width, 0.09))
        places = [place / (len(scale.ticks) - 1) for place in range(len(scale.ticks))]
        colours = matplotlib.cm.ScalarMappable(Normalize(0, 1), scale.colours)
        bar = Colorbar(axis, colours, orientation="horizontal", ticks=places)
        bar.ax.set_xticklabels(scale.ticks, fontsize=7, color="#444")
        bar.ax.tick_params(length=2, pad=2)
        for label, place in zip(bar.ax.get_xticklabels(), places, strict=True):  # outer labels stay inside the panel
            label.set_horizontalalignment("left" if place == 0 else "right" if place == 1 else "center")

    def text(self, words: str, left: float, down: float, va: str = "top", **style: Any) -> None:
        place = left / self.width, 1 - down / self.height
        self.figure.text(*place, words, va=va, parse_math=False, **style)  # dollar signs do not begin formulas

    def titles(self, title: str, subtitle: str) -> float:
        """Write both titles on a line each, cut at the edge of the figure; returns the position of their lower end."""
        for words, down, letters_per_inch, style in (
            (title, 0.1, 9.5, {"fontsize": 13, "weight": "bold"}),
            (subtitle, 0.37, 12.5, {"fontsize": 10, "color": "#444"}),
        ):
            line, limit = " ".join(words.split()), int((self.width - MARGIN) * letters_per_inch)
            self.text(line if len(line) <= limit else line[: limit - 1] + "…", MARGIN, down, **style)
        return _title_height(subtitle)

    def _box(self, left: float, down: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / self.width, 1 - (down + height) / self.height, width / self.width, height / self.height


def draw_table(stages: Sequence[Stage], names: Sequence[str], title: str, subtitle: str = "") -> Figure:
    """Draw one row for each view and one column for each stage; several rows have their `names` beside them."""
    margin = MARGIN + (0.2 if len(names) > 1 else 0)
    sizes = [_fitted(panel, STILL) for panel in stages[0].panels]
    scaled = any(stage.scale for stage in stages)
    width = max(NARROWEST, margin + len(stages) * (STILL + GAP) - GAP + MARGIN)
    body = sum(height + GAP for _, height in sizes) - GAP
    page = _Page(width, _title_height(subtitle) + LINE + body + BAR * scaled + MARGIN)
    top = page.titles(title, subtitle) + LINE
    for column, stage in enumerate(stages):
        left, down = margin + column * (STILL + GAP), top
        page.text(stage.head, left + STILL / 2, top - LINE, ha="center", fontsize=9.5, color="#333")
        for name, panel, (wide, high) in zip(names, stage.panels, sizes, strict=True):
            page.picture(panel, left + (STILL - wide) / 2, down, wide, high)
            if len(names) > 1 and column == 0:
                middle = MARGIN + 0.04, down + high / 2
                page.text(name, *middle, rotation=90, va="center", ha="center", fontsize=9, color="#555")
            down += high + GAP
        if stage.scale:
            page.scale(stage.scale, left, down + 0.02, STILL)
    return page.figure


def draw_contact_sheet(stages: Sequence[Stage], names: Sequence[str], title: str, subtitle: str = "") -> Figure:
    """Draw a band for each stage with all views (frames of a video) from left to right, in several lines if needed."""
    across = min(FRAMES, len(names))
    sizes = [_fitted(panel, FRAME) for panel in stages[0].panels]
    high = max(height for _, height in sizes)
    lines = math.ceil(len(names) / across)
    bands = [LINE + lines * (high + LINE) + (BAR if stage.scale else 0) for stage in stages]
    width = max(NARROWEST, 2 * MARGIN + across * (FRAME + GAP) - GAP)
    page = _Page(width, _title_height(subtitle) + sum(bands) + MARGIN)
    top = page.titles(title, subtitle)
    for stage, band in zip(stages, bands, strict=True):
        page.text(stage.head, MARGIN, top, fontsize=9.5, weight="bold", color="#333")
        for number, (name, panel, (wide, tall)) in enumerate(zip(names, stage.panels, sizes, strict=True)):
            line, place = divmod(number, across)
            left, down = MARGIN + place * (FRAME + GAP), top + LINE + line * (high + LINE)
            page.picture(panel, left + (FRAME - wide) / 2, down, wide, tall)
            page.text(name, left + FRAME / 2, down + high + 0.03, ha="center", fontsize=7, color="#555")
        if stage.scale:
            page.scale(stage.scale, MARGIN, top + band - BAR + 0.04, 2 * FRAME)
        top += band
    return page.figure


def _title_height(subtitle: str) -> float:
    return 0.72 if subtitle else 0.5


def _fitted(panel: Image.Image, side: float) -> tuple[float, float]:
    """Width and height of a panel of this shape, `side` wide and at most `TALLEST` times as high."""
    height = min(side * panel.height / panel.width, side * TALLEST)
    return height * panel.width / panel.height, height
