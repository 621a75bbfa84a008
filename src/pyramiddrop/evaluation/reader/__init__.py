"""The reader benchmark: scenes, documents and charts of 336 x 336 pixels, with questions that have one right answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pyramiddrop.evaluation.digits import split_rng
from pyramiddrop.evaluation.reader.canvas import IMAGE as IMAGE
from pyramiddrop.evaluation.reader.canvas import PATCH as PATCH
from pyramiddrop.evaluation.reader.canvas import Picture, Question
from pyramiddrop.evaluation.reader.charts import draw_chart
from pyramiddrop.evaluation.reader.documents import draw_document
from pyramiddrop.evaluation.reader.scenes import draw_scene

#: Functions that draw a new picture of a group, with the handwritten digits and the layouts of a split.
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

    No two splits share a handwritten digit, a layout or a scene. Picture `i` does not depend on `pictures`.
    """

    split: str = "test"  # or "val" or "train"
    pictures: int = 90  # their number; the groups take turns
    questions_per_picture: int = 12  # different ones, as evenly over the kinds as the picture allows
    seed: int = 0  # selects another list of pictures of the same split

    def __iter__(self) -> Iterator[ReaderSample]:
        for index in range(self.pictures):
            group, picture, questions = self.drawn(index)
            image = Image.fromarray(picture.pixels)
            for one in questions:
                yield ReaderSample(image, group, one.kind, one.text, one.answer, index)

    def drawn(self, index: int) -> tuple[str, Picture, list[Question]]:
        """Picture number `index`, its group and its questions."""
        rng = split_rng(self.split, self.seed, index)
        group = tuple(GROUPS)[index % len(GROUPS)]
        picture = GROUPS[group](rng, self.split)
        return group, picture, spread_over_kinds(rng, picture, self.questions_per_picture)


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
