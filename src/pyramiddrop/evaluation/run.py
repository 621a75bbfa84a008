"""Run an evaluation: vanilla and methods answer the same questions, at equal cost if asked for, and are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyramiddrop.evaluation.answering import Answerer, Reply
from pyramiddrop.evaluation.budgets import (
    at_average_tokens,
    at_budget,
    check_average_tokens,
    check_percent,
    choose_methods,
    control_methods,
    drop_layers,
)
from pyramiddrop.evaluation.matching import MATCHES
from pyramiddrop.evaluation.scores import Array
from pyramiddrop.evaluation.store import Store, Times
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.hf.model_info import UnsupportedModelError, inspect_model
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.inference.timing import time_prefills
from pyramiddrop.method_spec import VANILLA, method_label
from pyramiddrop.methods import Method

ROUNDS = 5

#: Told what is being done, and how many questions were answered since it was told last.
Progress = Callable[[str, int], None]


PERCENT, TOKENS = "percent", "average_tokens"
SOLVERS = {PERCENT: at_budget, TOKENS: at_average_tokens}


@dataclass(frozen=True)
class Budget:
    """What every method may cost at most: `limit` percent of vanilla's decoder FLOPs, or average visual tokens."""

    kind: str
    limit: float


@dataclass(frozen=True)
class EvalOptions:
    """What was asked for; `model` None is the bundled one.

    Attributes:
        methods: in words; for none, the one saved beside the checkpoint, or else those published.
        percents, average_tokens: budgets in percent of vanilla's decoder FLOPs, and in visual tokens of a layer on
            average. Every method is solved for each of them; for none, the methods stay as they are.
        rounds: how often a prefill is timed under each method; 0 for never.
        output: where replies and times are kept, and looked for.
        controls: whether the controls of `control_methods` answer, too; needs a budget.
    """

    methods: tuple[str, ...] = ()
    percents: tuple[float, ...] = ()
    model: str | None = None
    batch: int = 16
    max_new_tokens: int = 32
    device: str | None = None
    dtype: str | None = None
    output: Path | None = None
    average_tokens: tuple[float, ...] = ()
    rounds: int = ROUNDS
    controls: bool = False

    @property
    def budgets(self) -> list[Budget]:
        """All of them, the percentages first."""
        return [*(Budget(PERCENT, one) for one in self.percents), *(Budget(TOKENS, one) for one in self.average_tokens)]


@dataclass(frozen=True)
class Outcome:
    """What came of one variant.

    Attributes:
        method: None for vanilla.
        budget: what it was solved for, or None.
        replies: to each sample.
        points: (N,) what each reply scored, from 0 to 1.
    """

    method: Method | None
    budget: Budget | None
    replies: Sequence[Reply]
    points: Array

    @property
    def label(self) -> str:
        """What a table calls it."""
        return VANILLA if self.method is None else method_label(self.method)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, vanilla first. `times` are of a prefill of the first batch, methods in turn, or none;
    `left_out` are controls that this model cannot have, and why."""

    task: Task
    options: EvalOptions
    checkpoint: Checkpoint
    outcomes: Sequence[Outcome]
    times: Times | None
    left_out: Mapping[str, str]


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
        for tokens in options.average_tokens:
            check_average_tokens(tokens)
        self.checkpoint = load_checkpoint(source, options.device, options.dtype)
        with user_input(caught=(UnsupportedModelError, ValueError)):
            self._info = inspect_model(self.checkpoint.model)
            self._layers = [drop_layers(self.checkpoint, method) for method in self.methods]
        self._left_out: dict[str, str] = {}
        if options.controls:
            self._add_controls()
        if options.budgets and self._info.sizes is None:
            option = "--percent" if options.percents else "--average-tokens"
            raise InputError(f"{option} needs a text model that the cost model knows, and it does not know this one")
        self.answerer = Answerer(self.checkpoint, options.batch, options.max_new_tokens)
        self._store = Store(options.output, self.answerer, task.samples) if options.output else None

    def _add_controls(self) -> None:
        """Let the controls answer, too, that this model can have."""
        if not self.options.budgets:
            raise InputError(
                "--controls need a budget, --percent or --average-tokens: without one each costs something else"
            )
        for control in control_methods(self.methods):
            try:
                self._layers.append(drop_layers(self.checkpoint, control))
                self.methods.append(control)
            except (UnsupportedModelError, ValueError) as error:
                self._left_out[method_label(control)] = str(error)

    @property
    def total(self) -> int:
        """How many questions are answered, over all methods."""
        return len(self.task.samples) * (1 + len(self.methods) * max(1, len(self.options.budgets)))

    def run(self, progress: Progress = lambda step, count: None) -> Evaluation:
        """Answer, score and time. What the output folder holds of it already is not done again."""
        variants = [(None, None), *self._solved(progress)]  # all are solved before the first is run
        replies = self._replies([method for method, _ in variants], progress)
        outcomes = [self._outcome(*variant, said) for variant, said in zip(variants, replies, strict=True)]
        times = None
        if self.options.rounds:
            progress("timing prefills", 0)
            times = self._times([outcome.method for outcome in outcomes])
        return Evaluation(self.task, self.options, self.checkpoint, outcomes, times, self._left_out)

    def _solved(self, progress: Progress) -> list[tuple[Method, Budget | None]]:
        """The methods, at each budget for what is asked. A budget out of reach is found here, before any answer."""
        if not self.options.budgets:
            return [(method, None) for method in self.methods]
        progress("counting tokens", 0)
        prompts = self.answerer.prompts(self.task.samples)
        found: list[tuple[Method, Budget | None]] = []
        for budget in self.options.budgets:
            solve = SOLVERS[budget.kind]
            for method, layers in zip(self.methods, self._layers, strict=True):
                solved = solve(method, budget.limit, self._info.shape, prompts, layers), budget
                if solved in found:
                    unit = "%" if budget.kind == PERCENT else "average tokens"
                    raise InputError(f"two of the methods are {method_label(solved[0])} at {budget.limit:g} {unit}")
                found.append(solved)
        return found

    def _outcome(self, method: Method | None, budget: Budget | None, replies: Sequence[Reply]) -> Outcome:
        match = MATCHES[self.task.match]
        points = [match(reply.text, sample.answers) for reply, sample in zip(replies, self.task.samples, strict=True)]
        return Outcome(method, budget, replies, np.array(points))

    def _replies(self, methods: Sequence[Method | None], progress: Progress) -> list[list[Reply]]:
        """The replies under each method: a batch is answered under all of them before the next one begins."""
        samples, size = self.task.samples, self.options.batch
        journals = [self._store.journal(method) if self._store else None for method in methods]
        replies = [journal.read(size, len(samples)) if journal else [] for journal in journals]
        for method, said in zip(methods, replies, strict=True):
            progress(_name(method), len(said))
        for start in range(0, len(samples), size):
            waiting = [number for number, said in enumerate(replies) if len(said) == start]
            asked = [methods[number] for number in waiting]
            answered = self.answerer.answers_by_method(samples[start : start + size], asked) if asked else ()
            for number, batch in zip(waiting, answered, strict=True):
                if (journal := journals[number]) is not None:
                    journal.append_replies(batch)
                replies[number] += batch
                progress(_name(methods[number]), len(batch))
        return replies

    def _times(self, methods: Sequence[Method | None]) -> Times:
        def measure() -> Times:
            first = self.task.samples[: self.options.batch]
            split = {str(number): self.answerer.split(method) for number, method in enumerate(methods)}
            variants = {name: inside for name, (_, inside) in split.items()}
            smaller = {name: self.answerer.inputs(first, share) for name, (share, _) in split.items() if share}
            inputs, rounds = self.answerer.inputs(first), self.options.rounds
            times = time_prefills(self.checkpoint.model, inputs, variants, rounds, own_inputs=smaller)
            return list(times.values())

        return self._store.times(methods, measure) if self._store else measure()


def _name(method: Method | None) -> str:
    return VANILLA if method is None else type(method).__name__
