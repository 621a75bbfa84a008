"""Charts: vertical and horizontal bars and lines, with printed labels and an axis with printed numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from pyramiddrop.evaluation.reader.canvas import (
    CATEGORIES,
    COLOURS,
    IMAGE,
    PLACES,
    Array,
    Box,
    Canvas,
    Picture,
    Question,
    layouts_of,
    pick,
    printed,
    tinted,
)

LEVELS = 8
STEPS = (1, 2, 5, 10)  # the value of a level of the axis
BAR_COLOURS = tuple(colour for colour in COLOURS if colour not in ("white", "yellow"))  # visible on light paper
KINDS_OF_CHART = ("upright", "lying", "line")
FEWEST, MOST = 3, 6


@dataclass(frozen=True)
class Layout:
    """The layout of a chart."""

    kind: str
    count: int
    grid: str
    wide: bool  # bars almost touch; large markers


ORDER = 12  # seed of the layouts of the splits
LAYOUTS = [
    Layout(*one) for one in product(KINDS_OF_CHART, range(FEWEST, MOST + 1), ("none", "lines", "dashes"), (False, True))
]


@dataclass(frozen=True)
class Plot:
    """The axes of a chart: `origin` and lengths in pixels, and whether values run to the right."""

    origin: tuple[int, int]
    slot: float
    level: float
    lying: bool

    def box(self, index: int, low: float, high: float, width: float) -> Box:
        """The rectangle over slot `index` from level `low` to `high`, as wide as the share `width` of the slot."""
        middle = (index + 0.5) * self.slot
        start, end = round(middle - width * self.slot / 2), round(middle + width * self.slot / 2)
        near, far = round(low * self.level), round(high * self.level)
        x, y = self.origin
        if self.lying:
            return Box(x + near, y + start, far - near, end - start)
        return Box(x + start, y - far, end - start, far - near)


def draw_chart(rng: np.random.Generator, split: str) -> Picture:
    """Draw a new chart in one of the layouts of `split`."""
    layouts = layouts_of(split, LAYOUTS, ORDER)
    layout = layouts[rng.integers(len(layouts))]
    levels = _levels(rng, layout.count)
    labels = pick(rng, CATEGORIES, layout.count)
    if layout.kind == "line":
        colours = [str(rng.choice(BAR_COLOURS))] * layout.count
    else:
        colours = pick(rng, BAR_COLOURS, layout.count)
    step = int(rng.choice(STEPS))
    plot = _plot(rng, layout)

    paper = tuple((rng.integers(226, 254) + rng.integers(-10, 2, 3)).tolist())
    image = Image.new("RGB", (IMAGE, IMAGE), paper)
    ink = rng.integers(0, 80, 3)
    _draw_axes(image, rng, plot, layout)
    inks = [tinted(rng, colour) for colour in colours]
    if layout.kind == "line":
        _draw_line(image, plot, levels, inks[0], layout.wide)
    else:
        for index, (level, shade) in enumerate(zip(levels, inks, strict=True)):
            box = plot.box(index, 0, level, 0.85 if layout.wide else 0.6)
            corners = box.left, box.top, box.right - 1, box.bottom - 1
            ImageDraw.Draw(image).rectangle(corners, tuple(shade.tolist()))
    canvas = Canvas(rng, split, image)
    _print_ticks(canvas, plot, step, ink)
    _print_labels(canvas, plot, labels, ink)
    for index, (level, label, colour) in enumerate(zip(levels, labels, colours, strict=True)):
        _label_value(canvas, plot, index, level, str(level * step), owner=label, colour=colour)
        for extreme, value in (("highest", max(levels)), ("lowest", min(levels))):
            if level == value:
                canvas.label(plot.box(index, 0, level, 0.6), height=extreme)
    return canvas.finish(_questions(layout, labels, colours, levels, step))


def _levels(rng: np.random.Generator, count: int) -> list[int]:
    """Draw whole levels of which the highest and the lowest occur once."""
    while True:
        levels: list[int] = rng.integers(1, LEVELS + 1, count).tolist()
        ordered = sorted(levels)
        if ordered[0] < ordered[1] and ordered[-1] > ordered[-2]:
            return levels


def _plot(rng: np.random.Generator, layout: Layout) -> Plot:
    far = int(rng.integers(14, 24))  # empty pixels beyond the last level
    if layout.kind == "lying":
        left, top, bottom = int(rng.integers(52, 66)), int(rng.integers(8, 24)), int(rng.integers(28, 40))
        return Plot((left, top), (IMAGE - top - bottom) / layout.count, (IMAGE - left - far) / LEVELS, True)
    left, right, bottom = int(rng.integers(34, 46)), int(rng.integers(4, 12)), int(rng.integers(30, 44))
    return Plot((left, IMAGE - bottom), (IMAGE - left - right) / layout.count, (IMAGE - bottom - far) / LEVELS, False)


def _draw_axes(image: Image.Image, rng: np.random.Generator, plot: Plot, layout: Layout) -> None:
    draw = ImageDraw.Draw(image)
    grey = (int(rng.integers(150, 205)),) * 3
    length = round(plot.slot * layout.count)
    for level in range(LEVELS + 1):
        start, end = _across(plot, level, 0), _across(plot, level, length)
        if level == 0:
            draw.line((*start, *end), (60, 60, 60), 2)
        elif layout.grid == "lines":
            draw.line((*start, *end), grey, 1)
        elif layout.grid == "dashes":
            for dash in range(0, length - 4, 12):
                draw.line((*_across(plot, level, dash), *_across(plot, level, dash + 5)), grey, 1)
        else:
            draw.line((*_across(plot, level, -5), *start), (60, 60, 60), 1)


def _across(plot: Plot, level: float, along: float) -> tuple[int, int]:
    """The pixel at a level of the value axis, `along` pixels from it."""
    x, y = plot.origin
    if plot.lying:
        return round(x + level * plot.level), round(y + along)
    return round(x + along), round(y - level * plot.level)


def _draw_line(image: Image.Image, plot: Plot, levels: list[int], ink: Array, wide: bool) -> None:
    draw = ImageDraw.Draw(image)
    colour, radius = tuple(ink.tolist()), 8 if wide else 6
    points = [_across(plot, level, (index + 0.5) * plot.slot) for index, level in enumerate(levels)]
    draw.line([value for point in points for value in point], colour, 4 if wide else 3)
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _print_ticks(canvas: Canvas, plot: Plot, step: int, ink: Array) -> None:
    slots = round((IMAGE - plot.origin[1] - 28) / plot.slot)
    foot = round(plot.origin[1] + slots * plot.slot)  # the pixel row below the last slot of horizontal bars
    for level in range(1, LEVELS + 1):
        text = str(level * step)
        height, width = printed(text, 15).shape
        x, y = _across(plot, level, 0)
        left, top = (x - width // 2, foot + 8) if plot.lying else (x - 8 - width, y - height // 2)
        canvas.leave_open(canvas.word(text, left, top, 15, ink))


def _print_labels(canvas: Canvas, plot: Plot, labels: list[str], ink: Array) -> None:
    for index, label in enumerate(labels):
        height, width = printed(label, 17).shape
        x, y = _across(plot, 0, (index + 0.5) * plot.slot)
        left, top = (x - 6 - width, y - height // 2) if plot.lying else (x - width // 2, y + 8)
        canvas.label(canvas.word(label, left, top, 17, ink), content=label)


def _label_value(canvas: Canvas, plot: Plot, index: int, level: int, value: str, owner: str, colour: str) -> None:
    """Label a bar with its value from its end to its base, as a number is read from left to right."""
    shares = np.linspace(level, 0, len(value) + 1)
    for place, digit in enumerate(value):
        box = plot.box(index, shares[place + 1], shares[place], 0.6)
        canvas.label(box, content=digit, colour=colour, side=PLACES[place], owner=owner)


def _questions(layout: Layout, labels: list[str], colours: list[str], levels: list[int], step: int) -> list[Question]:
    mark = "point" if layout.kind == "line" else "bar"
    often = Counter(levels)
    questions = [
        Question("highest", f"Which {mark} is the highest?", labels[levels.index(max(levels))]),
        Question("lowest", f"Which {mark} is the lowest?", labels[levels.index(min(levels))]),
        Question("bar_count", f"How many {mark}s are there?", str(len(labels))),
    ]
    for label, colour, level in zip(labels, colours, levels, strict=True):
        questions.append(Question("bar_value", f"What is the value of {label}?", str(level * step)))
        if often[level] == 1:
            questions.append(Question("bar_at", f"Which {mark} is at {level * step}?", label))
        if layout.kind != "line":
            questions.append(Question("bar_colour", f"What colour is {label}?", colour))
    return questions
