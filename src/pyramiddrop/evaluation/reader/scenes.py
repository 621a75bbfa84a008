"""Scenes: coloured handwritten digits and shapes of any size and place over a cluttered background."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pyramiddrop.evaluation.reader.canvas import (
    COLOURS,
    DIGITS,
    HEIGHTS,
    IMAGE,
    SHAPES,
    SIDES,
    Array,
    Box,
    Canvas,
    Picture,
    Question,
    pick,
    scribble,
    texture,
    tinted,
)

SMALLEST, LARGEST = 44, 84
FEWEST, MOST = 3, 8
MOST_COUNTED = 5
MARGIN = 10  # a centre this close to a border between two areas belongs to neither
YES_OR_NO = 3  # questions of each answer about a scene


@dataclass(frozen=True)
class Thing:
    """A coloured digit or shape; `area` contains its centre, or is None if that is near a border."""

    name: str
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Its centre in pixels, (x, y)."""
        return self.box.left + self.box.width / 2, self.box.top + self.box.height / 2

    @property
    def nearest_area(self) -> tuple[str, str]:
        """The ninth of the picture that contains its centre, as (height, side)."""
        x, y = self.centre
        return HEIGHTS[int(3 * y / IMAGE)], SIDES[int(3 * x / IMAGE)]

    @property
    def area(self) -> str | None:
        """The same as text; None if the centre is too near to a border."""
        borders = (IMAGE / 3, 2 * IMAGE / 3)
        near = any(abs(value - border) < MARGIN for value in self.centre for border in borders)
        return None if near else " ".join(self.nearest_area)


def draw_scene(rng: np.random.Generator, split: str) -> Picture:
    """Draw a new scene with digits of `split`."""
    ground = texture(rng, 15, 75)
    canvas = Canvas(rng, split, scribble(rng, ground, int(rng.integers(0, 14)), (40, 125)))
    things = [_draw(canvas, *one) for one in _plan(rng)]
    return canvas.finish(_questions(rng, things))


def _plan(rng: np.random.Generator) -> list[tuple[str, str, Box]]:
    """Draw things from a few names and colours, so that some occur once and some several times."""
    colours = pick(rng, COLOURS, int(rng.integers(3, 7)))
    digits = pick(rng, DIGITS, int(rng.integers(3, 7)))
    plan: list[tuple[str, str, Box]] = []
    for _ in range(rng.integers(FEWEST, MOST + 1)):
        name = str(rng.choice(SHAPES if rng.random() < 0.25 else digits))
        box = _free_box(rng, [other for *_, other in plan])
        if box:
            plan.append((name, str(rng.choice(colours)), box))
    return plan


def _free_box(rng: np.random.Generator, taken: list[Box]) -> Box | None:
    for _ in range(20):
        size = int(rng.integers(SMALLEST, LARGEST + 1))
        left, top = rng.integers(2, IMAGE - size - 2, 2).tolist()
        box = Box(left, top, size, size)
        if not any(box.meets(other, gap=4) for other in taken):
            return box
    return None


def _draw(canvas: Canvas, name: str, colour: str, box: Box) -> Thing:
    ink = tinted(canvas.rng, colour)
    if name in SHAPES:
        canvas.paste(_shape(name, box.width), box.left, box.top, ink)
    else:
        canvas.handwriting(int(name), box.left, box.top, box.width, ink)
    thing = Thing(name, colour, box)
    height, side = thing.nearest_area
    canvas.label(box, content=name, colour=colour, height=height, side=side)
    return thing


def _shape(name: str, size: int) -> Array:
    """A filled shape: (size, size) in 0..255."""
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    inset = size // 8
    low, high = inset, size - inset
    if name == "circle":
        draw.ellipse((low, low, high, high), 255)
    elif name == "square":
        draw.rectangle((low, low, high, high), 255)
    elif name == "triangle":
        draw.polygon([(size / 2, low), (high, high), (low, high)], 255)
    else:
        angles = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2, 0.22, 0.5) * size
        tips = [(size / 2 + r * np.sin(a), size / 2 - r * np.cos(a)) for a, r in zip(angles, reach, strict=True)]
        draw.polygon(tips, 255)
    return np.array(image)


def _questions(rng: np.random.Generator, things: list[Thing]) -> list[Question]:
    names, colours = Counter(one.name for one in things), Counter(one.colour for one in things)
    digits = [one for one in things if one.name in DIGITS]
    digit_colours = Counter(one.colour for one in digits)
    digit_areas = Counter(area for one in digits for area in _areas_touched(one))
    questions = []
    for one in things:
        if names[one.name] == 1:
            questions.append(Question("colour_of", f"What colour is the {one.name}?", one.colour))
            if one.area:
                questions.append(Question("where", f"Where is the {one.name}?", one.area))
    for one in digits:
        if digit_colours[one.colour] == 1:
            questions.append(Question("digit_of", f"Which digit is {one.colour}?", one.name))
        if one.area and digit_areas[one.area] == 1:
            questions.append(Question("digit_at", f"Which digit is at the {one.area}?", one.name))
    for colour in COLOURS:
        if colours[colour] <= MOST_COUNTED and (colours[colour] or rng.random() < 0.1):
            questions.append(Question("count", f"How many things are {colour}?", str(colours[colour])))
    return questions + _yes_or_no(rng, things)


def _areas_touched(thing: Thing) -> list[str]:
    """The areas to which the centre of a thing may be assigned."""
    x, y = thing.centre
    heights = {HEIGHTS[int(3 * (y + shift) / IMAGE)] for shift in (-MARGIN, MARGIN)}
    sides = {SIDES[int(3 * (x + shift) / IMAGE)] for shift in (-MARGIN, MARGIN)}
    return [f"{height} {side}" for height in heights for side in sides]


def _yes_or_no(rng: np.random.Generator, things: list[Thing]) -> list[Question]:
    """POPE's questions, equally many with yes and no; an absent thing combines a name and a colour that are present."""
    there = {(one.colour, one.name) for one in things}
    names, colours = sorted({name for _, name in there}), sorted({colour for colour, _ in there})
    absent = [(colour, name) for colour in colours for name in names if (colour, name) not in there]
    asked = [("yes", f"{colour} {name}") for colour, name in sorted(there)]
    asked = [asked[index] for index in rng.permutation(len(asked))[:YES_OR_NO]]
    denied = [("no", " ".join(absent[index])) for index in rng.permutation(len(absent))[: len(asked)]]
    names_absent = [name for name in (*DIGITS, *SHAPES) if name not in names]
    asked += [("yes", name) for name in pick(rng, names, 2)]
    denied += [("no", name) for name in pick(rng, names_absent, len(asked) - len(denied))]
    return [
        Question("is_there", f"Is there {'an' if what[0] in 'aeiou8' else 'a'} {what}?", answer)
        for answer, what in asked + denied
    ]
