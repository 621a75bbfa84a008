"""Run an evaluation: vanilla and methods answer the same questions, optionally at equal cost, and are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyramiddrop.evaluation.answering import Answerer, Reply
from pyramiddrop.evaluation.budgets import PERCENT, TOKENS, Budget, choose_methods, control_methods, drop_layers
from pyramiddrop.evaluation.scores import Array
from pyramiddrop.evaluation.store import Store, Times, variant_name
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


@dataclass(frozen=True)
class EvalOptions:
    """The options of `eval`.

    Every method is solved for each budget, of `percents` and `average_tokens`; without one, the methods are unchanged.
    """

    methods: tuple[str, ...] = ()  # by default, the one saved beside the checkpoint, or else the published ones
    percents: tuple[float, ...] = ()  # of vanilla's decoder FLOPs
    model: str | None = None  # None: the bundled one
    batch: int = 16
    max_new_tokens: int = 32
    device: str | None = None
    dtype: str | None = None
    output: Path | None = None  # the folder in which replies and times are stored and looked up
    average_tokens: tuple[float, ...] = ()  # visual tokens of a layer
    rounds: int = ROUNDS  # how often a prefill is timed under each method; 0: never
    controls: bool = False  # add the controls of `control_methods`; needs a budget

    @property
    def budgets(self) -> list[Budget]:
        """All budgets, percentages first; InputError if a limit is not allowed."""
        return [*(Budget(PERCENT, one) for one in self.percents), *(Budget(TOKENS, one) for one in self.average_tokens)]


@dataclass(frozen=True)
class Outcome:
    """The replies of one variant (None: vanilla), and their scores `points`, (N,) from 0 to 1.

    `budget` is the one that the method was solved for.
    """

    method: Method | None
    budget: Budget | None
    replies: Sequence[Reply]
    points: Array

    @property
    def label(self) -> str:
        """The method's label in tables."""
        return VANILLA if self.method is None else method_label(self.method)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, with vanilla first."""

    task: Task
    options: EvalOptions
    checkpoint: Checkpoint
    outcomes: Sequence[Outcome]
    times: Times | None  # of a prefill of the first batch under each method, if it was timed
    left_out: Mapping[str, str]  # controls that the model does not support, with reasons


class Evaluator:
    """Checks the options and loads the model, with InputError if it cannot, then runs the evaluation."""

    def __init__(self, task: Task, options: EvalOptions) -> None:
        self.task, self.options = task, options
        source = options.model or str(task.bundled)
        self.methods = choose_methods(options.methods, source)
        budgets = options.budgets
        self.checkpoint = load_checkpoint(source, options.device, options.dtype)
        with user_input(caught=(UnsupportedModelError, ValueError)):
            self._info = inspect_model(self.checkpoint.model)
            self._layers = [drop_layers(self.checkpoint, method) for method in self.methods]
        self._left_out: dict[str, str] = {}
        if options.controls and not budgets:
            raise InputError(
                "--controls need a budget, --percent or --average-tokens: without one each costs something else"
            )
        for control in control_methods(self.methods) if options.controls else ():
            try:
                self._layers.append(drop_layers(self.checkpoint, control))
                self.methods.append(control)
            except (UnsupportedModelError, ValueError) as error:
                self._left_out[method_label(control)] = str(error)
        if budgets and self._info.sizes is None:
            option = "--percent" if options.percents else "--average-tokens"
            raise InputError(f"{option} needs a text model that the cost model knows, and it does not know this one")
        self.answerer = Answerer(self.checkpoint, options.batch, options.max_new_tokens)
        self._store = Store(options.output, self.answerer, task.samples) if options.output else None

    @property
    def total(self) -> int:
        """The number of answers over all methods."""
        return len(self.task.samples) * (1 + len(self.methods) * max(1, len(self.options.budgets)))

    def run(self, progress: Progress = lambda step, count: None) -> Evaluation:
        """Answer, score and time; results in the output folder are reused."""
        variants = [(None, None), *self._solved(progress)]  # all are solved before the first one runs
        replies = self._replies([method for method, _ in variants], progress)
        match, outcomes = MATCHES[self.task.match], list[Outcome]()
        for (method, budget), said in zip(variants, replies, strict=True):
            points = [match(reply.text, sample.answers) for reply, sample in zip(said, self.task.samples, strict=True)]
            outcomes.append(Outcome(method, budget, said, np.array(points)))
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
            for method, layers in zip(self.methods, self._layers, strict=True):
                solved = budget.solve(method, self._info.shape, prompts, layers), budget
                if solved in found:
                    unit = "%" if budget.kind == PERCENT else "average tokens"
                    raise InputError(f"two of the methods are {method_label(solved[0])} at {budget.limit:g} {unit}")
                found.append(solved)
        return found

    def _replies(self, methods: Sequence[Method | None], progress: Progress) -> list[list[Reply]]:
        """The replies under each method; a batch is answered under all methods before the next one."""
        samples, size = self.task.samples, self.options.batch
        journals = [self._store.journal(method) if self._store else None for method in methods]
        replies = [journal.read(size, len(samples)) if journal else [] for journal in journals]
        for method, said in zip(methods, replies, strict=True):
            progress(variant_name(method), len(said))
        for start in range(0, len(samples), size):
            waiting = [number for number, said in enumerate(replies) if len(said) == start]
            asked = [methods[number] for number in waiting]
            answered = self.answerer.answers_by_method(samples[start : start + size], asked) if asked else ()
            for number, batch in zip(waiting, answered, strict=True):
                if (journal := journals[number]) is not None:
                    journal.append_replies(batch)
                replies[number] += batch
                progress(variant_name(methods[number]), len(batch))
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
