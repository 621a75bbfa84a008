"""The vocabulary of the reader benchmark's pictures, questions and answers."""

from __future__ import annotations

from pyramiddrop.evaluation.digits import COLOUR_NAMES

NOTHING = "empty"
DIGITS = tuple(map(str, range(10)))
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = COLOUR_NAMES
HEIGHTS = ("top", "middle", "bottom")
SIDES = ("left", "centre", "right")
FIELDS = (
    *("total", "tax", "price", "cash", "change", "items", "table", "guests"),
    *("room", "floor", "seat", "gate", "tip", "age", "weight", "code"),
)
TITLES = ("receipt", "invoice", "form", "ticket", "bill")
CATEGORIES = ("fig", "nut", "pear", "plum", "kiwi", "lime", "date", "bean", "corn", "rice", "leek", "beet")
MOST_LINES = 7
LINES = tuple(f"line {number}" for number in range(1, MOST_LINES + 1))
EXTREMES = ("highest", "lowest")
PLACES = ("first", "second", "third")  # places of a digit in a number

#: The possible contents of a patch, one word of each tuple: the labels with which training aligns features.
CHANNELS: dict[str, tuple[str, ...]] = {
    "content": (NOTHING, *DIGITS, *SHAPES, *FIELDS, *TITLES, *CATEGORIES),
    "colour": (NOTHING, *COLOURS),
    "height": (NOTHING, *HEIGHTS, *LINES, *EXTREMES),
    "side": (NOTHING, *SIDES, *PLACES),
    "owner": (NOTHING, *FIELDS, *CATEGORIES),
}
