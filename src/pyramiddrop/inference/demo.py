"""The demo: ask the bundled model about the bundled pictures, without and with a method, and time both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from pyramiddrop import Method, PyramidDrop
from pyramiddrop.assets import demo_images, demo_questions, reader_checkpoint
from pyramiddrop.inference.answer import Comparison, Outcome, compare
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.prompt import build_batch, build_inputs, open_picture
from pyramiddrop.inference.timing import PrefillTime, cpu_threads, time_prefills

MAX_NEW_TOKENS = 8
RUNS = 5
BATCH, BATCH_RUNS = 8, 3


@dataclass(frozen=True)
class Question:
    """A question about the picture in the file `image`, with its true answer.

    `why` explains which dropped tokens a wrong answer of PyramidDrop needed.
    """

    image: Path
    kind: str
    question: str
    answer: str
    why: str = ""


@dataclass(frozen=True)
class Asked:
    """A question, its picture, and the answers."""

    question: Question
    picture: Image.Image
    comparison: Comparison

    @property
    def vanilla_right(self) -> bool:
        """True if vanilla's answer is right."""
        return self.comparison.vanilla.answer == self.question.answer

    @property
    def pruned_right(self) -> bool:
        """True if the method's answer is right."""
        return self.comparison.pruned.answer == self.question.answer

    @property
    def why_wrong(self) -> str:
        """The known reason if PyramidDrop is wrong and vanilla is right, else empty."""
        return self.question.why if self.vanilla_right and not self.pruned_right else ""

    def as_dict(self) -> dict[str, Any]:
        """FLOPs, bytes and seconds as plain numbers, with text."""
        return {
            "image": self.question.image.name,
            "kind": self.question.kind,
            "question": self.question.question,
            "true_answer": self.question.answer,
            "vanilla_right": self.vanilla_right,
            "pruned_right": self.pruned_right,
            **self.comparison.as_dict(),
        }


@dataclass(frozen=True)
class BatchPrefill:
    """The prefill of `size` prompts at once, without and with the method."""

    size: int
    vanilla: PrefillTime
    pruned: PrefillTime

    @property
    def cpu_ratio(self) -> float:
        """CPU time of the pruned prefill as a share of vanilla's."""
        return self.pruned.cpu / self.vanilla.cpu

    def as_dict(self) -> dict[str, Any]:
        """Seconds as plain numbers."""
        return {
            "size": self.size,
            "vanilla_prefill_cpu_seconds": self.vanilla.cpu,
            "pruned_prefill_cpu_seconds": self.pruned.cpu,
            "prefill_cpu_ratio": self.cpu_ratio,
        }


@dataclass(frozen=True)
class Demo:
    """The results of the demo: all questions, each asked alone, and the prefill of a batch of them."""

    checkpoint: Checkpoint
    method: Method
    asked: list[Asked]
    batch: BatchPrefill

    @property
    def right(self) -> list[tuple[bool, bool]]:
        """For each question, whether vanilla and the method answered exactly right."""
        return [(asked.vanilla_right, asked.pruned_right) for asked in self.asked]

    def medians(self, value: Callable[[Outcome], float]) -> tuple[float, float]:
        """The medians of a quantity over the questions, for vanilla and for the method."""
        comparisons = [asked.comparison for asked in self.asked]
        return (
            statistics.median(value(one.vanilla) for one in comparisons),
            statistics.median(value(one.pruned) for one in comparisons),
        )

    @property
    def prefill_cpu_ratio(self) -> float:
        """CPU time of a single prompt's pruned prefill as a share of vanilla's."""
        vanilla, pruned = self.medians(lambda one: one.prefill.cpu)
        return pruned / vanilla

    def as_dict(self) -> dict[str, Any]:
        """FLOPs, bytes and seconds as plain numbers, with text."""
        return {
            "questions": [asked.as_dict() for asked in self.asked],
            "vanilla_right": sum(asked.vanilla_right for asked in self.asked),
            "pruned_right": sum(asked.pruned_right for asked in self.asked),
            "prefill_cpu_ratio": self.prefill_cpu_ratio,
            "batch": self.batch.as_dict(),
        }


def run_demo(questions: int, progress: Callable[[str], None] = lambda step: None) -> Demo:
    """Ask `questions` of the bundled questions, on one CPU thread; `progress` is called with each step.

    Raises:
        ValueError: for fewer than one question.
    """
    method = PyramidDrop()
    with cpu_threads(1):
        progress("loading the bundled model")
        checkpoint = load_checkpoint(reader_checkpoint(), device="cpu")
        asked = []
        for question in pick_questions(questions):
            progress(f"asking: {question.question}")
            picture = open_picture(question.image)
            inputs = build_inputs(checkpoint.processor, [picture], question.question)
            found = compare(checkpoint, inputs, method, MAX_NEW_TOKENS, RUNS, fastest=True)
            asked.append(Asked(question, picture, found))
        progress(f"timing the prefill of {BATCH} prompts at once")
        prompts = [([one.picture], one.question.question) for one in islice(cycle(asked), BATCH)]
        inputs = build_batch(checkpoint.processor, prompts)
        times = time_prefills(checkpoint.model, inputs, {"vanilla": None, "pruned": method}, BATCH_RUNS, min)
        return Demo(checkpoint, method, asked, BatchPrefill(BATCH, times["vanilla"], times["pruned"]))


def pick_questions(count: int) -> list[Question]:
    """The first `count` bundled questions, with the pictures in turn; all of them if there are fewer.

    Raises:
        ValueError: for fewer than one.
    """
    if count < 1:
        raise ValueError(f"questions must be at least 1; got {count}")
    questions = demo_questions()
    by_picture = [[Question(image, **entry) for entry in questions[image.name]] for image in demo_images()]
    in_turn = chain.from_iterable(zip_longest(*by_picture))
    return [question for question in in_turn if question][:count]
