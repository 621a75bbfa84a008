"""Tasks: samples, and the rule by which their answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.digits import KIND_NAMES
from pyramiddrop.evaluation.matching import MATCHES
from pyramiddrop.evaluation.samples import Sample, digits_samples, read_samples
from pyramiddrop.inference.errors import InputError

DIGITS = "digits"
SCENES, PER_SCENE = 80, 16


@dataclass(frozen=True)
class Task:
    """Samples with right answers.

    Attributes:
        about: where they come from, as plain values.
        match: when an answer is right; a name in `pyramiddrop.evaluation.matching.MATCHES`.
        kinds: of the samples, in the order of a table.
    """

    name: str
    about: dict[str, Any]
    samples: Sequence[Sample]
    match: str
    kinds: tuple[str, ...]


def digits_task(split: str = "test", seed: int = 0, limit: int | None = None) -> Task:
    """The digits benchmark, or its first `limit` questions.

    Raises:
        InputError: for an unknown split or limit, or where scikit-learn is not installed.
    """
    _check_limit(limit)
    scenes = SCENES if limit is None else -(-limit // PER_SCENE)
    samples = digits_samples(split, scenes, seed)[:limit]
    asked = {sample.kind for sample in samples}
    about = {"split": split, "seed": seed}
    return Task(DIGITS, about, samples, "same", tuple(kind for kind in KIND_NAMES if kind in asked))


def file_task(
    file: Path, images: Path | None = None, match: str = "exact", limit: int | None = None, answered: bool = True
) -> Task:
    """A user's own questions, or the first `limit` of them; see `pyramiddrop.evaluation.samples.read_samples`.

    Args:
        answered: whether every question needs an answer.

    Raises:
        InputError: for what cannot be read, a question without an answer, or an unknown `match`.
    """
    _check_limit(limit)
    if match not in MATCHES:
        raise InputError(f"--metric must be one of {', '.join(MATCHES)}; got {match!r}")
    samples = read_samples(file, images)[:limit]
    for index, sample in enumerate(samples):
        if answered and not sample.answers:
            raise InputError(f'{file.name}[{index}]: no "answer" to compare with')
    return Task(file.name, {}, samples, match, tuple(dict.fromkeys(sample.kind for sample in samples)))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1; got {limit}")
