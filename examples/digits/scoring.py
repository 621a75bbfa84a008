"""Owns how well a model answers: greedy answers in batches, exact match, and errors that are clustered by scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoProcessor

from pyramiddrop.evaluation.digits import KIND_NAMES, DigitsSample

Array = NDArray[Any]


@dataclass(frozen=True)
class Score:
    """A mean and its standard error, as parts of one."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"

    def signed(self) -> str:
        """The same for a difference."""
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f}"


class Answerer:
    """A checkpoint that answers samples greedily, in left-padded batches."""

    def __init__(self, checkpoint: Path, batch: int = 64) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.batch = batch

    def answers(
        self, samples: Sequence[DigitsSample], advance: Callable[[int], None] = lambda count: None
    ) -> list[str]:
        """The answers; ``advance`` is told the size of each batch that is done."""
        answers: list[str] = []
        for start in range(0, len(samples), self.batch):
            part = samples[start : start + self.batch]
            answers += self._answer(part)
            advance(len(part))
        return answers

    def right(self, samples: Sequence[DigitsSample], advance: Callable[[int], None] = lambda count: None) -> Array:
        """1.0 where the answer is exactly the true one, else 0.0."""
        answers = self.answers(samples, advance)
        return np.array([float(given == sample.answer) for given, sample in zip(answers, samples, strict=True)])

    @torch.inference_mode()
    def _answer(self, samples: Sequence[DigitsSample]) -> list[str]:
        text = [self.prompt(sample.question) for sample in samples]
        images = [sample.image for sample in samples]
        inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(new, skip_special_tokens=True))

    def prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))


def score(values: Array, scenes: Array) -> Score:
    """The mean of ``values`` over all questions; its error takes the questions of a scene as one draw."""
    mean = values.mean()
    sums = np.array([(values[scenes == scene] - mean).sum() for scene in np.unique(scenes)])
    clusters = len(sums)
    error = np.sqrt(clusters / max(clusters - 1, 1) * (sums**2).sum()) / len(values)
    return Score(float(mean), float(error), len(values))


def score_by_kind(values: Array, samples: Sequence[DigitsSample]) -> dict[str, Score]:
    """The score of each kind of question, and of ``"all"``."""
    scenes, kinds = np.array([sample.scene for sample in samples]), np.array([sample.kind for sample in samples])
    scores = {kind: score(values[kinds == kind], scenes[kinds == kind]) for kind in KIND_NAMES}
    return {**scores, "all": score(values, scenes)}
