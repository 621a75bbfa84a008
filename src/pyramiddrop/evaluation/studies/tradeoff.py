"""Owns the trade-off study (the paper's Figure 4): several methods, each at several budgets."""

from __future__ import annotations

from dataclasses import replace

from pyramiddrop.evaluation.run import EvalOptions, Evaluator
from pyramiddrop.evaluation.studies.labelled import Labelled
from pyramiddrop.evaluation.tasks import Task
from pyramiddrop.inference.choice import parse_method
from pyramiddrop.inference.errors import InputError

METHODS = ("pyramiddrop", "fastv", "uniform", "random")
PERCENTS = (40.0, 50.0, 60.0, 70.0, 80.0)


def prepare_tradeoff(task: Task, options: EvalOptions) -> Labelled:
    """The study, checked and loaded; each way's `line` is its method in the words of `options`.

    Args:
        options: METHODS and PERCENTS stand for `methods` and `percents` that are empty.

    Raises:
        InputError: for anything that was asked for and cannot be used.
    """
    words = tuple(word for word in options.methods or METHODS if parse_method(word) is not None)
    if not words:
        raise InputError("--methods names vanilla alone, which always runs; name a method that drops tokens")
    percents = options.percents or PERCENTS
    evaluator = Evaluator(task, replace(options, methods=words, percents=percents))
    return Labelled("tradeoff", evaluator, [{"line": word} for _ in percents for word in words])
