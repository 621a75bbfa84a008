"""Documents: receipts and forms with printed words and handwritten numbers, on paper over a background."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import ImageDraw

from pyramiddrop.evaluation.reader.canvas import (
    FIELDS,
    IMAGE,
    LINES,
    MOST_LINES,
    PLACES,
    TITLES,
    Canvas,
    Picture,
    Question,
    layouts_of,
    pick,
    scribble,
    texture,
)

FEWEST_LINES = 4
LONGEST_NUMBER = 3
STEP = 29  # pixels from one handwritten digit to the next
WORD_WIDTH = 84  # pixels of the widest printed word


@dataclass(frozen=True)
class Layout:
    """The layout of a document."""

    labels: str  # the side of the printed words
    title: str  # the place of the title
    rules: str  # what separates the lines
    lines: int


_PLACES, _RULES = ("left", "centre", "right"), ("none", "lines", "boxes")
ORDER = 11  # seed of the layouts of the splits
LAYOUTS = [Layout(*one) for one in product(("left", "right"), _PLACES, _RULES, range(FEWEST_LINES, MOST_LINES + 1))]


def draw_document(rng: np.random.Generator, split: str) -> Picture:
    """Draw a new document in one of the layouts of `split`, with its handwritten digits."""
    layouts = layouts_of(split, LAYOUTS, ORDER)
    layout = layouts[rng.integers(len(layouts))]
    width, left, right = _paper(rng, layout)
    ground = texture(rng, 25, 120)
    image = scribble(rng, ground, int(rng.integers(0, 10)), (20, 160))
    paper_left, paper_top = int(rng.integers(0, IMAGE - width + 1)), int(rng.integers(0, 7))
    draw = ImageDraw.Draw(image)
    paper = tuple((rng.integers(222, 254) + rng.integers(-8, 3, 3)).tolist())
    draw.rectangle((paper_left, paper_top, paper_left + width, IMAGE - int(rng.integers(0, 7))), paper)

    title_height = int(rng.integers(44, 54))
    spacing = (IMAGE - paper_top - title_height - 8) // layout.lines
    spacing = int(rng.integers(36, min(spacing, 54) + 1))
    top = paper_top + title_height
    slack = IMAGE - 8 - top - spacing * layout.lines
    top += int(rng.integers(0, slack + 1)) if slack > 0 else 0
    lines = [top + index * spacing for index in range(layout.lines)]
    _rule(draw, rng, layout, (paper_left + 6, paper_left + width - 6), lines, spacing)
    canvas = Canvas(rng, split, image)

    title = str(rng.choice(TITLES))
    _print_title(canvas, title, layout.title, paper_left, paper_top, width)
    fields = pick(rng, FIELDS, layout.lines)
    values = [_value(rng) for _ in fields]
    print_ink = rng.integers(0, 70, 3)
    pen = rng.integers((0, 0, 90), (50, 60, 190)) if rng.random() < 0.6 else rng.integers(0, 60, 3)  # blue or black
    size = int(rng.integers(20, 24))
    for index, (field, value, y) in enumerate(zip(fields, values, lines, strict=True)):
        line = LINES[index]
        middle = y + spacing // 2
        x = paper_left + (left if layout.labels == "left" else right)
        word = canvas.word(field, x, middle - size // 2 + 1, size, print_ink)
        canvas.label(word, content=field, height=line)
        x = paper_left + (right if layout.labels == "left" else left) + int(rng.integers(-3, 4))
        y = middle - 15 + int(rng.integers(-2, 3))
        for place, box in enumerate(canvas.number(value, x, y, int(rng.integers(28, 32)), STEP, pen)):
            canvas.label(box, content=value[place], height=line, side=PLACES[place], owner=field)
    return canvas.finish(_questions(rng, title, fields, values))


def _paper(rng: np.random.Generator, layout: Layout) -> tuple[int, int, int]:
    """The paper's width, and the beginnings of its left and right columns."""
    number = LONGEST_NUMBER * STEP + 4
    first, second = (WORD_WIDTH, number) if layout.labels == "left" else (number, WORD_WIDTH)
    left = int(rng.integers(10, 24))
    right = left + first + int(rng.integers(8, 50))
    width = min(IMAGE, right + second + int(rng.integers(8, 40)))
    return width, left, right


def _rule(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    layout: Layout,
    sides: tuple[int, int],
    lines: list[int],
    spacing: int,
) -> None:
    """Draw the rules between the lines, or the boxes around them."""
    grey = (int(rng.integers(120, 200)),) * 3
    for y in lines:
        if layout.rules == "lines":
            draw.line((sides[0], y + spacing, sides[1], y + spacing), grey, 1)
        elif layout.rules == "boxes":
            draw.rectangle((sides[0], y + 1, sides[1], y + spacing - 2), None, grey, 1)


def _print_title(canvas: Canvas, title: str, place: str, left: int, top: int, width: int) -> None:
    size = int(canvas.rng.integers(26, 31))
    room = width - 120
    x = left + 8 + {"left": 0, "centre": room // 2, "right": room}[place]
    box = canvas.word(title, x, top + int(canvas.rng.integers(8, 14)), size, canvas.rng.integers(0, 70, 3))
    canvas.label(box, content=title)


def _value(rng: np.random.Generator) -> str:
    digits = int(rng.integers(1, LONGEST_NUMBER + 1))
    return str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _questions(rng: np.random.Generator, title: str, fields: list[str], values: list[str]) -> list[Question]:
    questions = [Question("title", "Which document is this?", title)]
    for line, field, value in zip(LINES, fields, values, strict=False):
        questions += [
            Question("field_value", f"What is the value of {field}?", value),
            Question("line_word", f"Which word is on {line}?", field),
            Question("read_line", f"Read {line}.", f"{field} {value}"),
        ]
    absent = [field for field in FIELDS if field not in fields]
    asked = [("yes", field) for field in pick(rng, fields, 3)] + [("no", field) for field in pick(rng, absent, 3)]
    return questions + [Question("has_field", f"Is there a value for {field}?", answer) for answer, field in asked]
