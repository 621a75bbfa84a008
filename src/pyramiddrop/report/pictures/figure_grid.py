"""Figures of panels: a table of views and stages, the contact sheet of a video, and GIFs of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from pyramiddrop.report.pictures.overlay import COLOURS

#: Inches: the side of a panel of a still and of a video frame, the gap between panels, the margin of the figure, the
#: height of a line of text, and the height of a colour bar with its labels.
STILL, FRAME, GAP, MARGIN, LINE, BAR = 2.6, 1.3, 0.1, 0.12, 0.24, 0.42
#: The largest ratio of a panel's height to its width.
TALLEST = 1.25
#: Frames of a video in a line, and the smallest width of a figure in inches, for its title.
FRAMES, NARROWEST = 8, 5.0


@dataclass(frozen=True)
class Stage:
    """One stage of a figure: its heading, the pixels of each view, and the labels of its colour bar, if it has one."""

    head: str
    panels: Sequence[Image.Image]
    ticks: Sequence[str] = ()


class _Page:
    """A figure that is filled from the top, below its titles; lengths are inches from its top left corner."""

    def __init__(self, width: float, body: float, title: str, subtitle: str) -> None:
        self.top = 0.72 if subtitle else 0.5
        self.width, self.height = width, self.top + body + MARGIN
        self.figure = Figure(figsize=(self.width, self.height), dpi=160)
        large: dict[str, Any] = {"fontsize": 13, "weight": "bold"}
        small: dict[str, Any] = {"fontsize": 10, "color": "#444"}
        for words, down, letters_per_inch, style in ((title, 0.1, 9.5, large), (subtitle, 0.37, 12.5, small)):
            line, limit = " ".join(words.split()), int((width - MARGIN) * letters_per_inch)  # cut at the edge
            self.text(line if len(line) <= limit else line[: limit - 1] + "…", MARGIN, down, **style)

    def picture(self, pixels: Image.Image, left: float, down: float, width: float, height: float) -> None:
        axis = self.figure.add_axes(self._box(left, down, width, height))
        axis.imshow(pixels, aspect="auto")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#999")

    def colour_bar(self, ticks: Sequence[str], left: float, down: float, width: float) -> None:
        """Draw the colours of scores, with `ticks` at equal distances from left to right."""
        axis = self.figure.add_axes(self._box(left, down, width, 0.09))
        places = [place / (len(ticks) - 1) for place in range(len(ticks))]
        bar = Colorbar(axis, ScalarMappable(Normalize(0, 1), COLOURS), orientation="horizontal", ticks=places)
        bar.ax.set_xticklabels(ticks, fontsize=7, color="#444")
        bar.ax.tick_params(length=2, pad=2)
        for label, place in zip(bar.ax.get_xticklabels(), places, strict=True):  # outer labels stay inside the panel
            label.set_horizontalalignment("left" if place == 0 else "right" if place == 1 else "center")

    def text(self, words: str, left: float, down: float, va: str = "top", **style: Any) -> None:
        place = left / self.width, 1 - down / self.height
        self.figure.text(*place, words, va=va, parse_math=False, **style)  # dollar signs do not begin formulas

    def _box(self, left: float, down: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / self.width, 1 - (down + height) / self.height, width / self.width, height / self.height


def draw_table(stages: Sequence[Stage], names: Sequence[str], title: str, subtitle: str = "") -> Figure:
    """Draw one row for each view and one column for each stage; several rows have their `names` beside them."""
    margin = MARGIN + (0.2 if len(names) > 1 else 0)
    sizes = [_fitted(panel, STILL) for panel in stages[0].panels]
    scaled = any(stage.ticks for stage in stages)
    width = max(NARROWEST, margin + len(stages) * (STILL + GAP) - GAP + MARGIN)
    body = sum(height + GAP for _, height in sizes) - GAP
    page = _Page(width, LINE + body + BAR * scaled, title, subtitle)
    top = page.top + LINE
    for column, stage in enumerate(stages):
        left, down = margin + column * (STILL + GAP), top
        page.text(stage.head, left + STILL / 2, top - LINE, ha="center", fontsize=9.5, color="#333")
        for name, panel, (wide, high) in zip(names, stage.panels, sizes, strict=True):
            page.picture(panel, left + (STILL - wide) / 2, down, wide, high)
            if len(names) > 1 and column == 0:
                middle = MARGIN + 0.04, down + high / 2
                page.text(name, *middle, rotation=90, va="center", ha="center", fontsize=9, color="#555")
            down += high + GAP
        if stage.ticks:
            page.colour_bar(stage.ticks, left, down + 0.02, STILL)
    return page.figure


def draw_contact_sheet(stages: Sequence[Stage], names: Sequence[str], title: str, subtitle: str = "") -> Figure:
    """Draw a band for each stage with all views (frames of a video) from left to right, in several lines if needed."""
    across = min(FRAMES, len(names))
    sizes = [_fitted(panel, FRAME) for panel in stages[0].panels]
    high = max(height for _, height in sizes)
    lines = math.ceil(len(names) / across)
    bands = [LINE + lines * (high + LINE) + (BAR if stage.ticks else 0) for stage in stages]
    width = max(NARROWEST, 2 * MARGIN + across * (FRAME + GAP) - GAP)
    page = _Page(width, sum(bands), title, subtitle)
    top = page.top
    for stage, band in zip(stages, bands, strict=True):
        page.text(stage.head, MARGIN, top, fontsize=9.5, weight="bold", color="#333")
        for number, (name, panel, (wide, tall)) in enumerate(zip(names, stage.panels, sizes, strict=True)):
            line, place = divmod(number, across)
            left, down = MARGIN + place * (FRAME + GAP), top + LINE + line * (high + LINE)
            page.picture(panel, left + (FRAME - wide) / 2, down, wide, tall)
            page.text(name, left + FRAME / 2, down + high + 0.03, ha="center", fontsize=7, color="#555")
        if stage.ticks:
            page.colour_bar(stage.ticks, MARGIN, top + band - BAR + 0.04, 2 * FRAME)
        top += band
    return page.figure


def _fitted(panel: Image.Image, side: float) -> tuple[float, float]:
    """Width and height of a panel of this shape, `side` wide and at most `TALLEST` times as high."""
    height = min(side * panel.height / panel.width, side * TALLEST)
    return height * panel.width / panel.height, height


#: Milliseconds for which a GIF shows a stage of stills, and a frame of a video.
STEP, MOMENT = 900, 400
#: Pixels in a GIF: the gap between pictures, the height of a heading, and its font size.
SPACE, HEAD, LETTERS = 6, 24, 15


def save_gif(stages: Sequence[Stage], moments: Sequence[int | None], path: Path) -> None:
    """Write one frame for each stage, with its views one below another, or one for each moment of a video.

    The latter have all stages side by side, with still pictures below; `moments` has None for the views of those.
    """
    times = sorted({moment for moment in moments if moment is not None})
    frames = [] if times else [_headed(stage.head, _stacked(stage.panels)) for stage in stages]
    for moment in times:
        shown = [place for place, own in enumerate(moments) if own in (moment, None)]
        parts = [_headed(stage.head, _stacked([stage.panels[place] for place in shown])) for stage in stages]
        turned = _stacked([part.transpose(Image.Transpose.TRANSPOSE) for part in parts])
        frames.append(turned.transpose(Image.Transpose.TRANSPOSE))
    duration = MOMENT if times else STEP
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _headed(head: str, pixels: Image.Image) -> Image.Image:
    font = ImageFont.load_default(LETTERS)
    width = max(pixels.width, int(font.getlength(head)) + 2 * SPACE)
    whole = Image.new("RGB", (width, pixels.height + HEAD), "white")
    ImageDraw.Draw(whole).text((SPACE, 3), head, fill="#333333", font=font)
    whole.paste(pixels, (0, HEAD))
    return whole


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    width, height = max(part.width for part in parts), sum(part.height + SPACE for part in parts) - SPACE
    whole, top = Image.new("RGB", (width, height), "white"), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + SPACE
    return whole
