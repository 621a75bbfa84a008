"""The record of a redundancy study as plain values, and the profile that `plan --profile` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pyramiddrop.evaluation.matching import MATCHES
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.scores import Score, score, score_by_kind
from pyramiddrop.evaluation.studies.grid import Grid
from pyramiddrop.evaluation.tasks import Task

BatchRecord = Mapping[str, Any]


def redundancy_record(task: Task, grid: Grid, batches: Sequence[BatchRecord]) -> dict[str, Any]:
    """The scores of the full model and of every cell, and the attention by layer.

    Args:
        pieces: of `Redundancy`, a batch each, in the order of the samples.
    """
    means, full = Means(task.samples), _joined(batches, "answers")
    right = _right(task, full)
    vanilla_flops = _joined(batches, "flops")
    cells = []
    for place, (layer, keep) in enumerate(grid.cells):
        parts = [piece["cells"][place] for piece in batches]
        answers = _joined(parts, "answers")
        accuracy = _right(task, answers)
        agreement = [float(one == other) for one, other in zip(answers, full, strict=True)]
        cells.append(
            {
                "layer": layer,
                "keep": keep,
                "accuracy": means.score(accuracy),
                "agreement": means.score(agreement),
                **{metric: means.score(_joined(parts, metric)) for metric in ("top1", "kl")},
                "by_kind": means.by_kind(accuracy),
                "flops_ratio": ratio(_joined(parts, "flops"), vanilla_flops),
            }
        )
    return {
        "samples": len(task.samples),
        "visual_tokens": float(np.mean(_joined(batches, "visual_tokens"))),
        "shared_prefix": all(piece["shared"] for piece in batches),
        "vanilla": {"accuracy": means.score(right), "by_kind": means.by_kind(right)},
        "cells": cells,
        "attention": _attention(means, [piece["attention"] for piece in batches]),
    }


def _right(task: Task, answers: Sequence[str]) -> list[float | None]:
    """What each answer scores; None where no right answer is known."""
    match, pairs = MATCHES[task.match], zip(answers, task.samples, strict=True)
    return [match(answer, sample.answers) if sample.answers else None for answer, sample in pairs]


def _attention(means: Means, batches: Sequence[Sequence[BatchRecord]]) -> list[dict[str, Any]]:
    """By layer; nothing where the prompts of some piece had too spread_layers visual tokens for any ranking."""
    layers = zip(*batches, strict=True) if all(batches) else ()
    return [
        {"layer": looks[0]["layer"], **{name: means.score(_joined(looks, name)) for name in ("picture", "crowd")}}
        for looks in layers
    ]


def _joined(batches: Sequence[BatchRecord], name: str) -> list[Any]:
    return [value for piece in batches for value in piece[name]]


#: A value a sample; None where there is nothing to score.
Values = Sequence[float | None]


class Means:
    """Means over these samples; those without a cluster are one of their own."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.kinds = [sample.kind for sample in samples]
        self.clusters = [sample.cluster or f"#{number}" for number, sample in enumerate(samples)]

    def score(self, values: Values) -> dict[str, Any] | None:
        """`mean`, its standard `error` (None where a single cluster tells nothing) and `count`; None for no values."""
        known, clusters, _ = self._known(values)
        return _plain(score(known, clusters)) if known else None

    def by_kind(self, values: Values) -> dict[str, dict[str, Any]]:
        """The same for each kind of question, where there are several."""
        known, clusters, kinds = self._known(values)
        if len(set(kinds)) < 2:
            return {}
        found = score_by_kind(known, clusters, kinds)
        return {kind: _plain(found[kind]) for kind in dict.fromkeys(kinds)}

    def _known(self, values: Values) -> tuple[list[float], list[str], list[str]]:
        rows = [row for row in zip(values, self.clusters, self.kinds, strict=True) if row[0] is not None]
        return [value for value, _, _ in rows if value is not None], [row[1] for row in rows], [row[2] for row in rows]


def _plain(one: Score) -> dict[str, Any]:
    """JSON has no NaN."""
    return {**asdict(one), "error": None if math.isnan(one.error) else one.error}


def ratio(used: Values, vanilla: Values) -> float | None:
    """What all samples used against what they use without dropping; None where some number is not known."""
    numbers, plain = [one for one in used if one is not None], [one for one in vanilla if one is not None]
    return sum(numbers) / sum(plain) if len(numbers) == len(used) and len(plain) == len(vanilla) else None


def profile_of(model: dict[str, Any]) -> dict[str, Any]:
    """The redundancy profile of one model of a study, as `pyramiddrop.planning.Profile` reads it.

    Its score is the accuracy where answers are known, and else the agreement of whole answers with the full model's.
    """
    vanilla = model["vanilla"]["accuracy"]
    metric = "agreement" if vanilla is None else "accuracy"
    return {
        "model": model["name"],
        "source": model["source"],
        "samples": model["samples"],
        "num_layers": model["num_layers"],
        "vanilla": 1.0 if vanilla is None else vanilla["mean"],
        "cells": [
            {"layer": cell["layer"], "keep": cell["keep"], metric: cell[metric]["mean"]} for cell in model["cells"]
        ],
    }
