"""The reader benchmark: scenes, documents and charts of 336 x 336 pixels, with questions that have one right answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pyramiddrop.evaluation.digits import SPLITS
from pyramiddrop.evaluation.reader.canvas import IMAGE, PATCH, Picture, Question
from pyramiddrop.evaluation.reader.charts import draw_chart
from pyramiddrop.evaluation.reader.documents import draw_document
from pyramiddrop.evaluation.reader.scenes import draw_scene

__all__ = [
    "GROUPS",
    "IMAGE",
    "KINDS",
    "PATCH",
    "Picture",
    "Question",
    "ReaderBenchmark",
    "ReaderSample",
    "draw_picture",
]


GROUPS: dict[str, Callable[[np.random.Generator, str], Picture]] = {
    "scenes": draw_scene,
    "documents": draw_document,
    "charts": draw_chart,
}
#: The kinds of question in each group.
KINDS: dict[str, tuple[str, ...]] = {
    "scenes": ("colour_of", "digit_of", "digit_at", "where", "is_there", "count"),
    "documents": ("field_value", "read_line", "line_word", "has_field", "title"),
    "charts": ("bar_value", "bar_at", "bar_colour", "highest", "lowest", "bar_count"),
}


@dataclass(frozen=True)
class ReaderSample:
    """One question about one picture. `picture` is the picture's number, by which errors are clustered."""

    image: Image.Image
    group: str
    kind: str
    question: str
    answer: str
    picture: int


@dataclass(frozen=True)
class ReaderBenchmark:
    """A fixed list of questions: iterate it, and compare exact answers.

    Args:
        split: `"test"`, `"val"` or `"train"`; no two of them share a handwritten digit, a layout or a scene.
        pictures: number of pictures; the groups take turns.
        questions_per_picture: number of different questions about each, as evenly over the kinds as it allows.
        seed: selects another list of pictures of the same split. Picture `i` does not depend on `pictures`.
    """

    split: str = "test"
    pictures: int = 90
    questions_per_picture: int = 12
    seed: int = 0

    def __iter__(self) -> Iterator[ReaderSample]:
        for index in range(self.pictures):
            group, picture, questions = self.drawn(index)
            image = Image.fromarray(picture.pixels)
            for one in questions:
                yield ReaderSample(image, group, one.kind, one.text, one.answer, index)

    def drawn(self, index: int) -> tuple[str, Picture, list[Question]]:
        """Picture number `index`, its group and its questions."""
        rng = picture_rng(self.split, self.seed, index)
        group = tuple(GROUPS)[index % len(GROUPS)]
        picture = draw_picture(group, self.split, rng)
        return group, picture, spread_over_kinds(rng, picture, self.questions_per_picture)


def picture_rng(split: str, *seed: int) -> np.random.Generator:
    """A random generator that differs from those of other splits."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS.index(split), *seed])


def draw_picture(group: str, split: str, rng: np.random.Generator) -> Picture:
    """Draw a new picture of a group, with the handwritten digits and the layouts of a split."""
    return GROUPS[group](rng, split)


def spread_over_kinds(rng: np.random.Generator, picture: Picture, count: int) -> list[Question]:
    """At most `count` different questions about a picture, as evenly over the kinds as it allows."""
    by_kind: dict[str, list[Question]] = {}
    for index in rng.permutation(len(picture.questions)):
        by_kind.setdefault(picture.questions[index].kind, []).append(picture.questions[index])
    chosen: list[Question] = []
    while len(chosen) < count and by_kind:
        for kind in list(by_kind):
            chosen.append(by_kind[kind].pop())
            if not by_kind[kind]:
                del by_kind[kind]
    return chosen[:count]
