"""The digits benchmark: handwritten digits on a coloured canvas, and questions about them with one right answer.

The digits are the 1797 real ones of scikit-learn's ``load_digits``, split by image; the scenes are split by seed. A
test scene therefore shares neither a digit image nor an arrangement with the training data. The training script of
``examples/digits`` draws its batches from the same :class:`SceneGenerator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pyramiddrop.assets import handwritten_digits

Array = NDArray[Any]

GRID = 8
CELL = 10
CANVAS = GRID * CELL
EMPTY = -1
SPLITS = ("train", "val", "test")
HELD_OUT = 200  # digit images in each of the two held-out splits
VARIANTS = {"train": 24, "val": 9, "test": 9}  # renderings of each digit image; those of "train" are distorted

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 230, 50),
    "cyan": (50, 225, 230),
    "magenta": (230, 60, 220),
    "orange": (250, 140, 20),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32) / 255

#: The wording of each kind of question.
KINDS: dict[str, str] = {
    "digit_at": "What digit is at row {row} column {column}?",
    "colour_at": "What colour is at row {row} column {column}?",
    "colour_of": "What colour is the {digit}?",
    "digit_of": "Which digit is {colour}?",
    "row_of": "What row is the {digit} in?",
    "read_row": "Read row {row}.",
}
KIND_NAMES = tuple(KINDS)
#: The number of different arguments of each kind: cells, digits, colours or rows.
ARGUMENTS = {"digit_at": 64, "colour_at": 64, "colour_of": 10, "digit_of": 8, "row_of": 10, "read_row": 8}

MAX_ANSWER = 3
#: An answer is at most three of these words; arrays hold their indices, padded with ``EMPTY``.
ANSWER_WORDS = (*map(str, range(10)), *COLOUR_NAMES, *(f"row {row + 1}" for row in range(GRID)))
FIRST_COLOUR, FIRST_ROW = 10, 10 + len(COLOUR_NAMES)


@dataclass(frozen=True)
class SceneStyle:
    """The numbers of digits and of clutter in a scene."""

    fewest: int = 8
    most: int = 22
    clutter: float = 0.5

    def scaled(self, factor: float) -> SceneStyle:
        """The same style with fewer digits and less clutter, for the beginning of training."""
        return SceneStyle(round(self.fewest * factor), max(1, round(self.most * factor)), self.clutter * factor)


@dataclass(frozen=True)
class SceneBatch:
    """Scenes: ``digits`` and ``colours`` are (B, 8, 8) with ``EMPTY`` cells, ``images`` is (B, 80, 80, 3) uint8."""

    digits: Array
    colours: Array
    images: Array


@dataclass(frozen=True)
class QuestionBatch:
    """Questions about a :class:`SceneBatch`: ``kinds`` and ``arguments`` are (B, K), ``answers`` is (B, K, 3)."""

    kinds: Array
    arguments: Array
    answers: Array


@dataclass(frozen=True)
class DigitsSample:
    """One question about one picture. ``scene`` is the picture's number, by which errors are clustered."""

    image: Image.Image
    kind: str
    question: str
    answer: str
    scene: int


@dataclass(frozen=True)
class DigitsBenchmark:
    """A fixed list of questions: iterate it, and compare exact answers.

    No two splits share a digit image or a scene. Scene ``i`` does not depend on ``scenes``.
    """

    split: str = "test"  # or ``"val"`` or ``"train"``
    scenes: int = 80  # number of pictures
    questions_per_scene: int = 16  # different ones, as evenly over the kinds as the picture allows
    seed: int = 0  # selects another list of scenes of the same split

    def __len__(self) -> int:
        return self.scenes * self.questions_per_scene

    def __iter__(self) -> Iterator[DigitsSample]:
        for scene in range(self.scenes):
            batch, questions = self.arrays(scene)
            image = Image.fromarray(batch.images[0])
            kinds, arguments, answers = questions.kinds[0], questions.arguments[0], questions.answers[0]
            for kind, argument, answer in zip(kinds, arguments, answers, strict=True):
                name = KIND_NAMES[kind]
                yield DigitsSample(image, name, question_text(name, int(argument)), answer_text(answer), scene)

    def arrays(self, scene: int) -> tuple[SceneBatch, QuestionBatch]:
        """Scene number ``scene`` and its questions, as arrays of batch size 1."""
        generator = SceneGenerator(self.split)
        rng = generator.rng(self.seed, scene)
        batch = generator.scenes(rng, 1)
        return batch, distinct_questions(rng, batch, self.questions_per_scene)


class SceneGenerator:
    """Draws scenes with digit images of one split."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.images, self.labels = digit_bank(split)
        self.by_digit = [np.flatnonzero(self.labels == digit) for digit in range(10)]

    def rng(self, *seed: int) -> np.random.Generator:
        """A random generator that differs from those of other splits."""
        return split_rng(self.split, *seed)

    def scenes(self, rng: np.random.Generator, count: int, style: SceneStyle = SceneStyle()) -> SceneBatch:
        """Draw ``count`` new scenes."""
        layouts = [_layout(rng, style) for _ in range(count)]
        digits, colours = (np.stack(part) for part in zip(*layouts, strict=True))
        return SceneBatch(digits, colours, self._render(rng, digits, colours, style.clutter))

    def _render(self, rng: np.random.Generator, digits: Array, colours: Array, clutter: float) -> Array:
        flat_digits, flat_colours = digits.reshape(-1), colours.reshape(-1)
        cells = len(flat_digits)
        grounds = rng.random((len(digits), 1, 3), dtype=np.float32) * 0.2
        grounds = np.repeat(grounds, GRID * GRID, axis=1).reshape(cells, 1, 1, 3)
        canvas = np.broadcast_to(grounds, (cells, CELL, CELL, 3)).copy()

        occupied = np.flatnonzero(flat_digits != EMPTY)
        shapes = np.stack([self.images[rng.choice(self.by_digit[digit])] for digit in flat_digits[occupied]])[..., None]
        tint = PALETTE[flat_colours[occupied]] + rng.uniform(-0.06, 0.06, (len(occupied), 3))
        ink = np.clip(tint, 0, 1)[:, None, None] * rng.uniform(0.8, 1, (len(occupied), 1, 1, 1))
        canvas[occupied] = canvas[occupied] * (1 - shapes) + shapes * ink

        cluttered = np.flatnonzero((flat_digits == EMPTY) & (rng.random(cells) < clutter))
        covered = (rng.random((len(cluttered), 5, 5)) < 0.4).repeat(2, axis=1).repeat(2, axis=2)[..., None]
        blocks = covered * rng.uniform(0.3, 0.9, (len(cluttered), 1, 1, 1))
        scribble = PALETTE[rng.integers(0, len(PALETTE), len(cluttered))][:, None, None]
        canvas[cluttered] = canvas[cluttered] * (1 - blocks) + blocks * scribble

        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 0.03
        pixels = (np.clip(canvas, 0, 1) * 255).astype(np.uint8)
        tiles = pixels.reshape(-1, GRID, GRID, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.ascontiguousarray(tiles.reshape(-1, CANVAS, CANVAS, 3))


@lru_cache(maxsize=3)
def digit_bank(split: str) -> tuple[Array, Array]:
    """The digit images of a split, each in several renderings: (N, 10, 10) in [0, 1], and their labels (N,)."""
    images, labels = handwritten_digits()
    pictures = images.astype(np.float32) / 16
    chosen = split_indices(split, len(labels))
    rng = np.random.default_rng([len(SPLITS), SPLITS.index(split)])
    cells = []
    for index in chosen:
        for variant in range(VARIANTS[split]):
            place = _distorted if split == "train" and variant else _shifted
            cells.append(place(pictures[index], rng))
    return np.stack(cells), np.repeat(labels[chosen], VARIANTS[split])


def split_indices(split: str, total: int = 1797) -> Array:
    """The indices of a split's digit images. The three sets are disjoint and cover all images."""
    order = np.random.RandomState(1234).permutation(total)
    bounds = {"val": slice(0, HELD_OUT), "test": slice(HELD_OUT, 2 * HELD_OUT), "train": slice(2 * HELD_OUT, None)}
    return order[bounds[_checked(split)]]


def split_rng(split: str, *seed: int) -> np.random.Generator:
    """A random generator that differs from those of other splits."""
    return np.random.default_rng([SPLITS.index(_checked(split)), *seed])


def draw_questions(
    rng: np.random.Generator,
    scenes: SceneBatch,
    per_scene: int,
    weights: Mapping[str, float] | None = None,
    read_lengths: Sequence[int] = (2, 3),
) -> QuestionBatch:
    """Draw random questions for a batch (for training). A kind that a scene does not allow becomes ``digit_at``."""
    masks = _candidates(scenes, read_lengths)
    share = np.array([(weights or {}).get(kind, 1.0) for kind in KIND_NAMES])
    kinds = rng.choice(len(KIND_NAMES), size=(len(scenes.digits), per_scene), p=share / share.sum())
    each = np.arange(len(scenes.digits))[:, None]
    askable = np.asarray(masks.any(-1))
    kinds = np.where(askable[each, kinds], kinds, 0)
    allowed = masks[each, kinds]
    cells = (rng.random(allowed.shape, dtype=np.float32) * allowed).argmax(-1)
    return _ask(scenes, kinds, cells)


def distinct_questions(rng: np.random.Generator, scenes: SceneBatch, count: int) -> QuestionBatch:
    """Draw ``count`` different questions about one scene, as evenly over the kinds as it allows (for the benchmark)."""
    masks = _candidates(scenes, (2, 3))[0]
    queues = [list(rng.permutation(np.flatnonzero(mask))) for mask in masks]
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count and any(queues):
        chosen += [(kind, int(queues[kind].pop())) for kind in rng.permutation(len(queues)) if queues[kind]]
    if len(chosen) < count:
        raise ValueError(f"questions_per_scene={count} is more than the {len(chosen)} questions that this scene has")
    kinds, cells = np.array(chosen[:count]).T
    return _ask(scenes, kinds[None], cells[None])


def question_text(kind: str, argument: int) -> str:
    """The text of a question: ``question_text("colour_of", 7)`` is ``"What colour is the 7?"``."""
    row, column = divmod(argument, GRID) if kind.endswith("_at") else (argument, 0)
    colour = COLOUR_NAMES[argument % len(COLOUR_NAMES)]
    return KINDS[kind].format(row=row + 1, column=column + 1, digit=argument, colour=colour)


def answer_text(codes: Sequence[int] | Array) -> str:
    """The text of an answer, given as indices into ``ANSWER_WORDS`` padded with ``EMPTY``."""
    return " ".join(ANSWER_WORDS[code] for code in codes if code != EMPTY)


def _candidates(scenes: SceneBatch, read_lengths: Sequence[int]) -> Array:
    """(B, kinds, 64): the cells that a question of each kind may be about (``read_row``: the first cell of the row)."""
    digits, colours = scenes.digits.reshape(-1, GRID * GRID), scenes.colours.reshape(-1, GRID * GRID)
    occupied = digits != EMPTY
    lone_digit, lone_colour = _unique(digits, 10), _unique(colours, len(COLOUR_NAMES))
    readable = np.zeros_like(scenes.digits, dtype=bool)
    readable[:, :, 0] = np.isin((scenes.digits != EMPTY).sum(-1), read_lengths)
    by_kind = {
        "digit_at": occupied,
        "colour_at": occupied,
        "colour_of": lone_digit,
        "digit_of": lone_colour,
        "row_of": lone_digit,
        "read_row": readable.reshape(-1, GRID * GRID),
    }
    return np.stack([by_kind[kind] for kind in KIND_NAMES], axis=1)


def _ask(scenes: SceneBatch, kinds: Array, cells: Array) -> QuestionBatch:
    """The arguments (B, K) and the answers of questions of these kinds about these cells."""
    digit = np.take_along_axis(scenes.digits.reshape(len(cells), -1), cells, axis=1)
    colour = np.take_along_axis(scenes.colours.reshape(len(cells), -1), cells, axis=1)
    row = cells // GRID
    arguments = np.choose(kinds, [cells, cells, digit, colour, digit, row])
    first = np.choose(kinds, [digit, colour + FIRST_COLOUR, colour + FIRST_COLOUR, digit, row + FIRST_ROW, digit])
    answers = np.full((*kinds.shape, MAX_ANSWER), EMPTY)
    answers[..., 0] = first
    reads = kinds == KIND_NAMES.index("read_row")
    order = np.argsort(scenes.digits == EMPTY, axis=-1, kind="stable")
    row_digits = np.take_along_axis(scenes.digits, order, axis=-1)[..., :MAX_ANSWER]  # (B, 8, 3), from left to right
    answers[reads] = row_digits[np.nonzero(reads)[0], row[reads]]
    return QuestionBatch(kinds, arguments, answers)


def _unique(values: Array, classes: int) -> Array:
    """(B, 64) bool, True if a cell's value occurs once in its scene."""
    counts = (values[..., None] == np.arange(classes)).sum(1)
    own: Array = np.take_along_axis(counts, np.maximum(values, 0), axis=1)
    return np.asarray((values != EMPTY) & (own == 1))


def _layout(rng: np.random.Generator, style: SceneStyle) -> tuple[Array, Array]:
    """Draw one scene's digits and colours, (8, 8) each. A few digits and two colours occur once, for questions."""
    digits, colours = np.full(GRID * GRID, EMPTY), np.full(GRID * GRID, EMPTY)
    classes, shades = rng.permutation(10), rng.permutation(len(COLOUR_NAMES))
    lone = classes[: rng.integers(2, 5)]
    common = classes[len(lone) + 1 :]
    crowd = int(rng.integers(style.fewest, style.most + 1))
    cells = rng.permutation(GRID * GRID)[: crowd + len(lone)]
    digits[cells[:crowd]] = rng.choice(common, size=crowd, p=rng.dirichlet(np.full(len(common), 6.0)))
    digits[cells[crowd:]] = lone
    colours[cells] = rng.choice(shades[2:], size=len(cells))
    colours[rng.choice(cells, size=2, replace=False)] = shades[:2]
    return digits.reshape(GRID, GRID), colours.reshape(GRID, GRID)


def _shifted(picture: Array, rng: np.random.Generator) -> Array:
    cell = np.zeros((CELL, CELL), np.float32)
    top, left = rng.integers(0, CELL - 7, size=2)
    cell[top : top + 8, left : left + 8] = picture
    return cell


def _distorted(picture: Array, rng: np.random.Generator) -> Array:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("the train split of digits needs SciPy: pip install 'pyramiddrop[eval]'") from error

    angle, scale, shear = np.deg2rad(rng.uniform(-14, 14)), rng.uniform(0.88, 1.12), rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]]) / scale
    centre = np.array([7.5, 7.5])
    offset = centre - turn @ centre + rng.uniform(-1, 1, 2)
    moved = ndimage.affine_transform(np.pad(picture, 4), turn, offset=offset, order=1)
    cell: Array = moved[3:13, 3:13].astype(np.float32)
    return cell


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    return split
