"""The demo: ask the bundled model about the bundled pictures, without and with a method."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pyramiddrop import Method, PyramidDrop
from pyramiddrop.assets import demo_images, demo_questions, digits_checkpoint
from pyramiddrop.inference.answer import Comparison, Outcome, compare
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.midsize import PrefillRatio, midsize_prefill
from pyramiddrop.inference.prompt import build_inputs, open_picture
from pyramiddrop.inference.timing import cpu_threads

MAX_NEW_TOKENS = 8
RUNS = 9


@dataclass(frozen=True)
class Question:
    """A question about the picture in the file `image`, with its true answer."""

    image: Path
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """A question, the picture, and what came of it."""

    question: Question
    picture: Image.Image
    comparison: Comparison

    @property
    def vanilla_right(self) -> bool:
        return self.comparison.vanilla.answer == self.question.answer

    @property
    def pruned_right(self) -> bool:
        return self.comparison.pruned.answer == self.question.answer


@dataclass(frozen=True)
class Demo:
    """All questions, and the prefill of a bigger random model (see :mod:`pyramiddrop.inference.midsize`)."""

    checkpoint: Checkpoint
    method: Method
    asked: list[Asked]
    midsize: PrefillRatio

    @property
    def right(self) -> list[tuple[bool, bool]]:
        """For each question whether vanilla, and whether the method answered exactly right."""
        return [(asked.vanilla_right, asked.pruned_right) for asked in self.asked]

    def medians(self, value: Callable[[Outcome], float]) -> tuple[float, float]:
        """The median over the questions of a number of vanilla, and of the same number of the method."""
        comparisons = [asked.comparison for asked in self.asked]
        return (
            statistics.median(value(one.vanilla) for one in comparisons),
            statistics.median(value(one.pruned) for one in comparisons),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text: FLOPs, bytes and seconds."""
        return {
            "questions": [_asked_dict(asked) for asked in self.asked],
            "vanilla_right": sum(asked.vanilla_right for asked in self.asked),
            "pruned_right": sum(asked.pruned_right for asked in self.asked),
            "midsize": _midsize_dict(self.midsize),
        }


def run_demo(questions: int, progress: Callable[[str], None] = lambda step: None) -> Demo:
    """Ask `questions` of the bundled questions, on the CPU and on one thread; `progress` is told each step.

    Raises:
        ValueError: for fewer than one question.
    """
    method = PyramidDrop()
    with cpu_threads(1):
        progress("loading the bundled model")
        checkpoint = load_checkpoint(digits_checkpoint(), device="cpu")
        asked = []
        for question in pick_questions(questions):
            progress(f"asking: {question.question}")
            asked.append(_ask(checkpoint, method, question))
        progress("timing the prefill of a random model of middle size")
        return Demo(checkpoint, method, asked, midsize_prefill(method))


def pick_questions(count: int) -> list[Question]:
    """`count` of the bundled questions: a new kind each time as long as there are new ones, the pictures in turn.

    All of them where there are not so many. Which ones does not depend on how the model does.

    Raises:
        ValueError: for fewer than one.
    """
    if count < 1:
        raise ValueError(f"questions must be at least 1; got {count}")
    left = bundled_questions()
    images = list(dict.fromkeys(question.image for question in left))
    picked: list[Question] = []
    while left and len(picked) < count:
        turn = images[len(picked) % len(images)]
        kinds = [question.kind for question in picked]
        chosen = min(left, key=lambda question: (kinds.count(question.kind), question.image != turn))
        left.remove(chosen)
        picked.append(chosen)
    return picked


def bundled_questions() -> list[Question]:
    """Every bundled question, picture by picture."""
    questions = demo_questions()
    return [Question(image, **entry) for image in demo_images() for entry in questions[image.name]]


def _ask(checkpoint: Checkpoint, method: Method, question: Question) -> Asked:
    picture = open_picture(question.image)
    inputs = build_inputs(checkpoint.processor, [picture], question.question)
    return Asked(question, picture, compare(checkpoint, inputs, method, MAX_NEW_TOKENS, RUNS))


def _asked_dict(asked: Asked) -> dict[str, Any]:
    question = asked.question
    return {
        "image": question.image.name,
        "kind": question.kind,
        "question": question.question,
        "true_answer": question.answer,
        "vanilla_right": asked.vanilla_right,
        "pruned_right": asked.pruned_right,
        **asked.comparison.as_dict(),
    }


def _midsize_dict(ratio: PrefillRatio) -> dict[str, Any]:
    return {
        "decoder_parameters": ratio.parameters,
        "visual_tokens": ratio.pruned.tokens_by_stage,
        "flops_ratio": ratio.predicted,
        "prefill_ratio": ratio.measured,
        "vanilla_prefill_seconds": ratio.vanilla_time.wall,
        "pruned_prefill_seconds": ratio.pruned_time.wall,
    }
