"""Owns the ablation (the paper's Table 4): PyramidDrop with several λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pyramiddrop.evaluation.run import EvalOptions, Evaluator
from pyramiddrop.evaluation.studies.labelled import Labelled
from pyramiddrop.evaluation.tasks import Task

#: Those of the paper.
LAMBDAS = (0.4, 0.5, 0.6)


def prepare_ablation(task: Task, lambdas: Sequence[float], options: EvalOptions) -> Labelled:
    """The study, checked and loaded; each way has its `lam`, ascending.

    Raises:
        InputError: for anything that was asked for and cannot be used.
    """
    chosen = sorted(set(lambdas))
    methods = tuple(f"pyramiddrop:lam={lam!r}" for lam in chosen)
    return Labelled("ablation", Evaluator(task, replace(options, methods=methods)), [{"lam": lam} for lam in chosen])
