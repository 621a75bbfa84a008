"""Studies of methods: the trade-off (the paper's Figure 4), and the ablation of λ (Table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyramiddrop.evaluation.record import evaluation_record
from pyramiddrop.evaluation.run import EvalOptions, Evaluator, Progress
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.inference import InputError
from pyramiddrop.inference.resolve import parse_method

METHODS = ("pyramiddrop", "fastv", "uniform", "random")
PERCENTS = (40.0, 50.0, 60.0, 70.0, 80.0)


def prepare_tradeoff(task: Task, options: EvalOptions) -> MethodStudy:
    """Check and load the trade-off study, whose record adds each method's specification as `line`.

    METHODS and PERCENTS are the defaults of `methods` and `percents`. InputError if an option cannot be used.
    """
    words = tuple(word for word in options.methods or METHODS if parse_method(word) is not None)
    if not words:
        raise InputError("--method names vanilla alone, which always runs; name a method that drops tokens")
    percents = options.percents or PERCENTS
    evaluator = Evaluator(task, replace(options, methods=words, percents=percents, rounds=0))
    return MethodStudy("tradeoff", evaluator, [{"line": word} for _ in percents for word in words])


#: The paper's values of λ.
LAMBDAS = (0.4, 0.5, 0.6)


def prepare_ablation(task: Task, lambdas: Sequence[float], options: EvalOptions) -> MethodStudy:
    """Check and load the ablation, whose record adds each method's `lam`, ascending; InputError for bad options."""
    chosen = sorted(set(lambdas))
    methods = tuple(f"pyramiddrop:lam={lam!r}" for lam in chosen)
    evaluator = Evaluator(task, replace(options, methods=methods, rounds=0))
    return MethodStudy("ablation", evaluator, [{"lam": lam} for lam in chosen])


@dataclass(frozen=True)
class MethodStudy:
    """An evaluation that is ready to run, without timing; the record adds `labels` to each method after vanilla."""

    study: str
    evaluator: Evaluator
    labels: Sequence[dict[str, Any]]

    def record(self, progress: Progress = lambda step, count: None) -> dict[str, Any]:
        """Run the evaluation; returns its record with the labels and the settings."""
        found, options = evaluation_record(self.evaluator.run(progress)), self.evaluator.options
        vanilla, *variants = found["methods"]
        labelled = [{**label, **variant} for label, variant in zip(self.labels, variants, strict=True)]
        setting = {**found["task"], **{name: found[name] for name in ("model", "dtype", "batch")}}
        setting |= {"methods": options.methods, "percent": options.percents}
        return {"study": self.study, **found, "methods": [vanilla, *labelled], "setting": setting}
