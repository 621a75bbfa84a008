"""A canvas and the vocabulary of the reader benchmark: textures, words, handwritten digits, labels of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pyramiddrop.assets import handwritten_digits
from pyramiddrop.evaluation.digits import COLOUR_NAMES, split_indices
from pyramiddrop.evaluation.digits import COLOURS as RGB

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


Array = NDArray[Any]
L = TypeVar("L")

IMAGE, PATCH = 336, 14
SIDE = IMAGE // PATCH
#: The label of a patch that training ignores.
UNLABELLED = -1
#: The largest rotation (degrees), slant, stretch, and shift of the corners (in its own pixels) of a handwritten digit.
TURN, SHEAR, STRETCH, BEND = 10, 0.12, 0.1, 0.5
FREEDOM = {"train": 1.4, "val": 0.7, "test": 0.7}
_CODES = [{word: code for code, word in enumerate(words)} for words in CHANNELS.values()]


@dataclass(frozen=True)
class Question:
    """A question with its kind and its right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """A picture with its questions."""

    pixels: Array  # (336, 336, 3) uint8
    labels: Array  # (576, 5) int8, the content of each patch as indices into the words of each of CHANNELS; -1: ignored
    questions: Sequence[Question]  # at least one of each kind that the picture allows


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """The column after the last one."""
        return self.left + self.width

    @property
    def bottom(self) -> int:
        """The row after the last one."""
        return self.top + self.height

    def meets(self, other: Box, gap: int = 0) -> bool:
        """True if two boxes are closer than `gap` pixels to each other."""
        apart_across = self.right + gap <= other.left or other.right + gap <= self.left
        return not (apart_across or self.bottom + gap <= other.top or other.bottom + gap <= self.top)


class Canvas:
    """Pixels and the labels of their patches; `split` determines which handwritten digits may appear."""

    def __init__(self, rng: np.random.Generator, split: str, ground: Image.Image) -> None:
        self.rng, self.split, self.pixels = rng, split, np.array(ground)
        self.labels = np.zeros((SIDE, SIDE, len(CHANNELS)), np.int8)

    def finish(self, questions: Sequence[Question]) -> Picture:
        """The finished picture, with camera noise."""
        noise = _noise_bank()
        plane = noise[self.rng.integers(len(noise))]
        top, left = self.rng.integers(0, plane.shape[0] - IMAGE + 1, 2)
        noisy = self.pixels.astype(np.int16) + plane[top : top + IMAGE, left : left + IMAGE]
        pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        return Picture(pixels, self.labels.reshape(SIDE * SIDE, -1), questions)

    def paste(self, alpha: Array, left: int, top: int, colour: Array) -> Box:
        """Blend in `colour` (3,) with opacity `alpha` (h, w) in 0..255."""
        height, width = alpha.shape
        area = self.pixels[top : top + height, left : left + width]
        share = alpha[..., None].astype(np.uint16)
        area[:] = (area * (255 - share) + share * colour.astype(np.uint16)) // 255
        return Box(left, top, width, height)

    def word(self, text: str, left: int, top: int, size: int, colour: Array) -> Box:
        """Print a word with its upper left corner at (left, top)."""
        return self.paste(printed(text, size), left, top, colour)

    def handwriting(self, digit: int, left: int, top: int, size: int, colour: Array) -> Box:
        """Write a digit with a handwritten image of this split."""
        images = digit_images(self.split)[digit]
        chosen = images[self.rng.integers(len(images))]
        return self.paste(_written(chosen, size, self.rng, FREEDOM[self.split]), left, top, colour)

    def number(self, value: str, left: int, top: int, size: int, step: int, colour: Array) -> list[Box]:
        """Write a number digit by digit, with `step` pixels from one to the next."""
        return [self.handwriting(int(one), left + index * step, top, size, colour) for index, one in enumerate(value)]

    def label(self, box: Box, **words: str) -> None:
        """Label the patches under a box in some of the channels, except those that it barely touches."""
        rows = _covered(box.top, box.bottom)
        columns = _covered(box.left, box.right)
        for channel, name in enumerate(CHANNELS):
            if name in words:
                self.labels[rows, columns, channel] = _CODES[channel][words[name]]

    def leave_open(self, box: Box) -> None:
        """Mark the patches under a box as ignored."""
        self.labels[_covered(box.top, box.bottom), _covered(box.left, box.right)] = UNLABELLED


def layouts_of(split: str, layouts: Sequence[L], seed: int) -> list[L]:
    """The layouts of a split; no two splits share one. Of nine, one is reserved for validation and one for the test."""
    rank = np.random.RandomState(seed).permutation(len(layouts)) % 9
    wanted = {"val": rank == 0, "test": rank == 1, "train": rank > 1}[split]
    return [layout for layout, mine in zip(layouts, wanted, strict=True) if mine]


def texture(rng: np.random.Generator, darkest: int, brightest: int, spread: int = 25, tint: int = 18) -> Array:
    """A background of slowly changing brightness and tint: (336, 336, 3) uint8."""
    cells = int(rng.integers(3, 9))
    level = rng.integers(darkest, brightest + 1)
    coarse = level + rng.integers(-spread, spread + 1, (cells, cells, 1)) + rng.integers(-tint, tint + 1, (1, 1, 3))
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((IMAGE, IMAGE), Image.Resampling.BILINEAR))


def scribble(rng: np.random.Generator, ground: Array, count: int, grey: tuple[int, int]) -> Image.Image:
    """Draw `count` strokes and patches of greyish clutter on `ground`."""
    image = Image.fromarray(ground)
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        colour = tuple((rng.integers(*grey) + rng.integers(-20, 21, 3)).clip(0, 255).tolist())
        x, y = rng.integers(-20, IMAGE, 2).tolist()
        wide, high = rng.integers(10, 90, 2).tolist()
        kind = rng.integers(4)
        if kind == 0:
            draw.line((x, y, x + wide, y + high), colour, int(rng.integers(1, 7)))
        elif kind == 1:
            draw.rectangle((x, y, x + wide, y + high), None, colour, int(rng.integers(1, 5)))
        elif kind == 2:
            draw.rectangle((x, y, x + wide, y + high // 2), colour)
        else:
            draw.arc((x, y, x + wide, y + high), 0, int(rng.integers(90, 300)), colour, int(rng.integers(1, 6)))
    return image


def tinted(rng: np.random.Generator, colour: str) -> Array:
    """A random shade of a named colour: (3,)."""
    shade = np.array(RGB[colour]) * rng.uniform(0.85, 1) + rng.uniform(-14, 14, 3)
    return np.clip(shade, 0, 255).astype(np.uint8)


def pick(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """Draw `count` different words."""
    return [words[index] for index in rng.permutation(len(words))[:count]]


@lru_cache(maxsize=1024)
def printed(text: str, size: int) -> Array:
    """A printed word, (h, w) in 0..255, in Pillow's own font."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    image = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, 255, font)
    return np.array(image)


@lru_cache(maxsize=3)
def digit_images(split: str) -> list[list[Image.Image]]:
    """The handwritten images of a split, by digit: 8 x 8 in the middle of 12 x 12."""
    images, labels = handwritten_digits()
    chosen = split_indices(split, len(labels))
    padded = np.pad((images.astype(np.uint16) * 15).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return [[Image.fromarray(padded[index]) for index in chosen if labels[index] == digit] for digit in range(10)]


def _written(digit: Image.Image, size: int, rng: np.random.Generator, freedom: float) -> Array:
    """Enlarge a digit to (size, size) with random rotation, slant, stretch, bending and pen width.

    `freedom` scales the distortion; training uses more of it than the held-out splits.
    """
    angle, shear = np.deg2rad(freedom * rng.uniform(-TURN, TURN)), freedom * rng.uniform(-SHEAR, SHEAR)
    across, down = 4.25 * (1 + freedom * rng.uniform(-STRETCH, STRETCH, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos * across, (shear - sin) * across], [sin * down, cos * down]])
    corners = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) @ matrix.T + 6
    corners += freedom * rng.uniform(-BEND, BEND, (4, 2))
    quad = corners.reshape(-1).tolist()
    enlarged = digit.transform((size, size), Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)
    threshold, gain = 40 + freedom * rng.uniform(-18, 18), 1.6 + freedom * rng.uniform(-0.3, 0.3)
    alpha: Array = np.clip((np.asarray(enlarged, np.float32) - threshold) * gain, 0, 255).astype(np.uint8)
    return alpha


@lru_cache(maxsize=1)
def _noise_bank() -> Array:
    """Planes of pixel noise to crop from, because drawing noise for each picture would take most of its time."""
    rng = np.random.default_rng(336)
    return rng.normal(0, 5, (8, IMAGE + 64, IMAGE + 64, 3)).round().astype(np.int8)


def _covered(start: int, stop: int) -> slice:
    """The patches with at least 5 pixels in a range of pixels, and at least one patch."""
    first = max(0, (start + 5) // PATCH)
    return slice(first, min(SIDE, max(first, (stop - 6) // PATCH) + 1))
