"""Tasks: samples, and the rules that score their answers: exact match, and VQA's soft accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyramiddrop.assets import digits_checkpoint, reader_checkpoint
from pyramiddrop.evaluation.digits import KIND_NAMES
from pyramiddrop.evaluation.reader import KINDS
from pyramiddrop.evaluation.samples import Sample, digits_samples, read_samples, reader_samples
from pyramiddrop.inference import InputError

#: Scores an answer against the right ones, from 0 to 1.
Match = Callable[[str, Sequence[str]], float]


def same(answer: str, right: Sequence[str]) -> float:
    """1 if the answer equals one of the right ones exactly."""
    return float(answer in right)


def exact(answer: str, right: Sequence[str]) -> float:
    """1 if it is one of the right ones, ignoring case, surrounding space and a final full stop."""
    return float(plain(answer) in map(plain, right))


def vqa(answer: str, right: Sequence[str]) -> float:
    """VQA's soft accuracy (arXiv 1505.00468) of an answer against those of several people, compared by `plain`.

    Each person is left out in turn; if n of the others gave the answer, it scores min(1, n / 3), and the score is the
    mean of these. The official script also normalises articles, number words and punctuation; this function does not.
    With fewer than four right answers it is `exact`.
    """
    given = [plain(one) for one in right]
    if len(given) < 4:
        return exact(answer, right)
    agree = given.count(plain(answer))
    missing_one = min(1.0, (agree - 1) / 3)  # if one of those who gave this answer is left out
    return (agree * missing_one + (len(given) - agree) * min(1.0, agree / 3)) / len(given)


def plain(text: str) -> str:
    """The text without case, surrounding space and a final full stop."""
    return text.strip().removesuffix(".").rstrip().casefold()


#: The rules by their names on the command line.
MATCHES: dict[str, Match] = {"same": same, "exact": exact, "vqa": vqa}


DIGITS, READER = "digits", "reader"
DIGITS_SCENES, READER_PICTURES = 80, 120


@dataclass(frozen=True)
class Task:
    """Samples with right answers."""

    name: str
    about: dict[str, Any]  # the origin of the samples, as plain values
    samples: Sequence[Sample]
    match: str  # the rule that scores answers, a name in MATCHES
    kinds: tuple[str, ...]  # of the samples, in the order of tables
    bundled: Path = field(default_factory=digits_checkpoint)  # the model that answers if none is named
    subkinds: tuple[str, ...] = ()  # finer kinds, in the order of tables; empty if no question has one


def digits_task(split: str = "test", seed: int = 0, limit: int | None = None) -> Task:
    """The digits benchmark, or `limit` of its questions over all pictures; InputError for an unknown split or limit."""
    _check_limit(limit)
    samples = spread(digits_samples(split, min(DIGITS_SCENES, limit or DIGITS_SCENES), seed), limit)
    asked = {sample.kind for sample in samples}
    kinds = tuple(kind for kind in KIND_NAMES if kind in asked)
    return Task(DIGITS, {"split": split, "seed": seed}, samples, "same", kinds)


def reader_task(split: str = "test", seed: int = 0, limit: int | None = None) -> Task:
    """The reader benchmark, like `digits_task`; the groups of pictures are its kinds."""
    _check_limit(limit)
    samples = spread(reader_samples(split, min(READER_PICTURES, limit or READER_PICTURES), seed), limit)
    asked = {name for sample in samples for name in (sample.kind, sample.subkind)}
    kinds = tuple(kind for kind in KINDS if kind in asked)
    subkinds = tuple(one for kind in kinds for one in KINDS[kind] if one in asked)
    return Task(READER, {"split": split, "seed": seed}, samples, "same", kinds, reader_checkpoint(), subkinds)


#: Benchmarks without a download, by name.
BUNDLED_TASKS = {DIGITS: digits_task, READER: reader_task}


def choose_task(
    *,
    tasks: str | None = None,
    data: Path | None = None,
    images: Path | None = None,
    metric: str | None = None,
    split: str | None = None,
    seed: int | None = None,
    limit: int | None = None,
    answered: bool = True,
) -> Task:
    """The task that the options describe; options are None if not given.

    Args:
        tasks: the name of a bundled benchmark; by default, digits.
        data, images, metric: a file of questions (see `read_samples`), the folder of its pictures, and the rule that
            scores answers; without a file, a bundled benchmark.
        split, seed: the split and the seed of the bundled benchmark.
        limit: the largest number of questions.
        answered: True if every question needs a right answer.

    Raises:
        InputError: if options contradict each other, a file cannot be read, or one of its questions lacks an answer.
    """
    if data is None:
        _refuse("belongs to", images=images, metric=metric)
        if (name := tasks or DIGITS) not in BUNDLED_TASKS:
            raise InputError(f"--tasks must be one of {', '.join(BUNDLED_TASKS)}; got {name!r}")
        return BUNDLED_TASKS[name](split or "test", seed or 0, limit)
    _refuse("means nothing with", tasks=tasks, split=split, seed=seed)
    _check_limit(limit)
    match = metric or "exact"
    if match not in MATCHES:
        raise InputError(f"--metric must be one of {', '.join(MATCHES)}; got {match!r}")
    samples = spread(read_samples(data, images), limit)
    for index, sample in enumerate(samples):
        if answered and not sample.answers:
            raise InputError(f'{data.name}[{index}]: no "answer" to compare with')
    return Task(data.name, {}, samples, match, tuple(dict.fromkeys(sample.kind for sample in samples)))


def _refuse(why: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name} {why} --data")


def spread(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` samples, in their order: those with the first questions about every picture, then the second."""
    asked: Counter[str] = Counter()
    turns = []
    for sample in samples:
        turns.append(asked[sample.cluster])
        asked[sample.cluster] += 1
    chosen = sorted(range(len(samples)), key=turns.__getitem__)[:limit]
    return [samples[index] for index in sorted(chosen)]


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1; got {limit}")
