"""Run an evaluation: vanilla and methods answer the same questions, at equal cost if asked for, and are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyramiddrop.evaluation.answering import Answerer, Reply
from pyramiddrop.evaluation.budgets import at_budget, check_percent, choose_methods, drop_layers
from pyramiddrop.evaluation.matching import MATCHES
from pyramiddrop.evaluation.scores import Array
from pyramiddrop.evaluation.store import Store, Times
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.hf.model_info import UnsupportedModelError, anatomy
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.inference.timing import time_prefills
from pyramiddrop.method_spec import VANILLA, method_label
from pyramiddrop.methods import Method

ROUNDS = 5

#: Told what is being done, and how many questions were answered since it was told last.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class EvalOptions:
    """What was asked for; `model` None is the bundled one.

    Attributes:
        methods: in words; for none, the one saved beside the checkpoint, or else those published.
        percents: budgets in percent of vanilla's decoder FLOPs, at each of which every method is solved; for none,
            the methods stay as they are.
        output: where replies and times are kept, and looked for.
    """

    methods: tuple[str, ...] = ()
    percents: tuple[float, ...] = ()
    model: str | None = None
    batch: int = 16
    max_new_tokens: int = 32
    device: str | None = None
    dtype: str | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one way to run.

    Attributes:
        method: None for vanilla.
        percent: the budget that it was solved for, or None.
        replies: to each sample.
        points: (N,) what each reply scored, from 0 to 1.
    """

    method: Method | None
    percent: float | None
    replies: Sequence[Reply]
    points: Array

    @property
    def label(self) -> str:
        """What a table calls it."""
        return VANILLA if self.method is None else method_label(self.method)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: vanilla first. `times` are of a prefill of the first batch, the ways in turn."""

    task: Task
    options: EvalOptions
    checkpoint: Checkpoint
    outcomes: Sequence[Outcome]
    times: Times


class Evaluator:
    """What was asked for, checked and loaded.

    Raises:
        InputError: at construction, for anything that the user gave and that cannot be used.
    """

    def __init__(self, task: Task, options: EvalOptions) -> None:
        self.task, self.options = task, options
        source = options.model or str(task.bundled)
        self.methods = choose_methods(options.methods, source)
        for percent in options.percents:
            check_percent(percent)
        self.checkpoint = load_checkpoint(source, options.device, options.dtype)
        with user_input(caught=(UnsupportedModelError, ValueError)):
            self._parts = anatomy(self.checkpoint.model)
            self._layers = [drop_layers(self.checkpoint.model, method) for method in self.methods]
        if options.percents and self._parts.sizes is None:
            raise InputError("--percent needs a text model that the cost model knows, and it does not know this one")
        self.answerer = Answerer(self.checkpoint, options.batch, options.max_new_tokens)
        self._store = Store(options.output, self.answerer, task.samples) if options.output else None

    @property
    def total(self) -> int:
        """How many questions are answered, over all ways."""
        return len(self.task.samples) * (1 + len(self.methods) * max(1, len(self.options.percents)))

    def run(self, progress: Progress = lambda step, count: None) -> Evaluation:
        """Answer, score and time. What the output folder holds of it already is not done again."""
        ways = [(None, None), *self._solved(progress)]  # all are solved before the first is run
        outcomes = [self._outcome(method, percent, progress) for method, percent in ways]
        progress("timing prefills", 0)
        times = self._times([outcome.method for outcome in outcomes])
        return Evaluation(self.task, self.options, self.checkpoint, outcomes, times)

    def _solved(self, progress: Progress) -> list[tuple[Method, float | None]]:
        """The methods, at each budget for what is asked. A budget out of reach is found here, before any answer."""
        if not self.options.percents:
            return [(method, None) for method in self.methods]
        progress("counting tokens", 0)
        prompts = self.answerer.prompts(self.task.samples)
        found: list[tuple[Method, float | None]] = []
        for percent in self.options.percents:
            for method, layers in zip(self.methods, self._layers, strict=True):
                solved = at_budget(method, percent, self._parts.shape, prompts, layers), percent
                if solved in found:
                    raise InputError(f"two of the methods are {method_label(solved[0])} at {percent:g} %")
                found.append(solved)
        return found

    def _outcome(self, method: Method | None, percent: float | None, progress: Progress) -> Outcome:
        replies, match = self._replies(method, progress), MATCHES[self.task.match]
        points = [match(reply.text, sample.answers) for reply, sample in zip(replies, self.task.samples, strict=True)]
        return Outcome(method, percent, replies, np.array(points))

    def _replies(self, method: Method | None, progress: Progress) -> list[Reply]:
        name, samples = VANILLA if method is None else type(method).__name__, self.task.samples
        journal = self._store.journal(method) if self._store else None
        replies = journal.read(self.options.batch, len(samples)) if journal else []
        progress(name, len(replies))
        with closing(self.answerer.batches(samples[len(replies) :], method)) as batches:
            for batch in batches:
                if journal:
                    journal.append_replies(batch)
                replies += batch
                progress(name, len(batch))
        return replies

    def _times(self, methods: Sequence[Method | None]) -> Times:
        def measure() -> Times:
            inputs = self.answerer.inputs(self.task.samples[: self.options.batch])
            ways = {str(number): method for number, method in enumerate(methods)}
            return list(time_prefills(self.checkpoint.model, inputs, ways, ROUNDS).values())

        return self._store.times(methods, measure) if self._store else measure()
