"""Run an evaluation: vanilla and methods answer the same questions, optionally at equal cost, and are scored."""

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
from pyramiddrop.evaluation.scores import Array
from pyramiddrop.evaluation.store import Store, Times
from pyramiddrop.evaluation.tasks import MATCHES, Task
from pyramiddrop.hf.model_info import UnsupportedModelError, inspect_model
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.timing import time_prefills
from pyramiddrop.method_spec import VANILLA, method_label
from pyramiddrop.methods import Method

ROUNDS = 5

#: Called with the current activity, and the number of questions answered since the last call.
Progress = Callable[[str, int], None]


PERCENT, TOKENS = "percent", "average_tokens"
SOLVERS = {PERCENT: at_budget, TOKENS: at_average_tokens}


@dataclass(frozen=True)
class Budget:
    """The largest cost of every method: `limit` percent of vanilla's decoder FLOPs, or average visual tokens."""

    kind: str
    limit: float


@dataclass(frozen=True)
class EvalOptions:
    """The options of `eval`; `model` None is the bundled one.

    Attributes:
        methods: method specifications; by default, the one saved beside the checkpoint, or else the published ones.
        percents, average_tokens: budgets in percent of vanilla's decoder FLOPs, and in average visual tokens of a
            layer. Every method is solved for each of them; without budgets, the methods are unchanged.
        rounds: how often a prefill is timed under each method; 0: never.
        output: the folder in which replies and times are stored and looked up.
        controls: True to add the controls of `control_methods`; needs a budget.
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
        """All budgets, percentages first."""
        return [*(Budget(PERCENT, one) for one in self.percents), *(Budget(TOKENS, one) for one in self.average_tokens)]


@dataclass(frozen=True)
class Outcome:
    """The result of one variant.

    Attributes:
        method: the method; None for vanilla.
        budget: the budget that it was solved for, or None.
        replies: the reply to each sample.
        points: (N,) the score of each reply, from 0 to 1.
    """

    method: Method | None
    budget: Budget | None
    replies: Sequence[Reply]
    points: Array

    @property
    def label(self) -> str:
        """Its label in tables."""
        return VANILLA if self.method is None else method_label(self.method)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, with vanilla first.

    `times` are those of a prefill of the first batch under each method, if it was timed; `left_out` has the controls
    that the model does not support, with reasons.
    """

    task: Task
    options: EvalOptions
    checkpoint: Checkpoint
    outcomes: Sequence[Outcome]
    times: Times | None
    left_out: Mapping[str, str]


class Evaluator:
    """Checks the options and loads the model, then runs the evaluation.

    Raises:
        InputError: at construction, if an option cannot be used.
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
        """Add the controls that the model supports."""
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
        """The number of answers over all methods."""
        return len(self.task.samples) * (1 + len(self.methods) * max(1, len(self.options.budgets)))

    def run(self, progress: Progress = lambda step, count: None) -> Evaluation:
        """Answer, score and time; results in the output folder are reused."""
        variants = [(None, None), *self._solved(progress)]  # all are solved before the first one runs
        replies = self._replies([method for method, _ in variants], progress)
        outcomes = [self._outcome(*variant, said) for variant, said in zip(variants, replies, strict=True)]
        times = None
        if self.options.rounds:
            progress("timing prefills", 0)
            times = self._times([outcome.method for outcome in outcomes])
        return Evaluation(self.task, self.options, self.checkpoint, outcomes, times, self._left_out)

    def _solved(self, progress: Progress) -> list[tuple[Method, Budget | None]]:
        """The methods solved for each budget, so that a budget out of reach is found before any answer."""
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
        """The replies under each method; a batch is answered under all methods before the next one."""
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
