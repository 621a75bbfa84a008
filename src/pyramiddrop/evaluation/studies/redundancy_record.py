"""The record of a redundancy study as plain values, and the profile that `plan --profile` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.scores import Score, score, score_by_kind
from pyramiddrop.evaluation.studies.inputs import Grid
from pyramiddrop.evaluation.tasks import MATCHES, Task

BatchRecord = Mapping[str, Any]


def redundancy_record(task: Task, grid: Grid, batches: Sequence[BatchRecord]) -> dict[str, Any]:
    """The record of the full model's scores, those of every cell, and the attention by layer.

    Args:
        pieces: the results of `Redundancy`, one for each batch, in the order of the samples.
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
    """The score of each answer; None if no right answer is known."""
    match, pairs = MATCHES[task.match], zip(answers, task.samples, strict=True)
    return [match(answer, sample.answers) if sample.answers else None for answer, sample in pairs]


def _attention(means: Means, batches: Sequence[Sequence[BatchRecord]]) -> list[dict[str, Any]]:
    """The attention by layer; empty if some prompts had too few visual tokens to rank."""
    layers = zip(*batches, strict=True) if all(batches) else ()
    return [
        {"layer": looks[0]["layer"], **{name: means.score(_joined(looks, name)) for name in ("picture", "crowd")}}
        for looks in layers
    ]


def _joined(batches: Sequence[BatchRecord], name: str) -> list[Any]:
    return [value for piece in batches for value in piece[name]]


#: A value for each sample; None if there is nothing to score.
Values = Sequence[float | None]


class Means:
    """Means over these samples; a sample without a cluster is a cluster of its own."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.kinds = [sample.kind for sample in samples]
        self.clusters = [sample.cluster or f"#{number}" for number, sample in enumerate(samples)]

    def score(self, values: Values) -> dict[str, Any] | None:
        """`mean`, its standard `error` (None for a single cluster) and `count`; None without values."""
        known, clusters, _ = self._known(values)
        return _plain(score(known, clusters)) if known else None

    def by_kind(self, values: Values) -> dict[str, dict[str, Any]]:
        """The same for each kind of question, if there are several."""
        known, clusters, kinds = self._known(values)
        if len(set(kinds)) < 2:
            return {}
        found = score_by_kind(known, clusters, kinds)
        return {kind: _plain(found[kind]) for kind in dict.fromkeys(kinds)}

    def _known(self, values: Values) -> tuple[list[float], list[str], list[str]]:
        rows = [row for row in zip(values, self.clusters, self.kinds, strict=True) if row[0] is not None]
        return [value for value, _, _ in rows if value is not None], [row[1] for row in rows], [row[2] for row in rows]


def _plain(one: Score) -> dict[str, Any]:
    """Replace NaN, which JSON does not have, by None."""
    return {**asdict(one), "error": None if math.isnan(one.error) else one.error}


def ratio(used: Values, vanilla: Values) -> float | None:
    """The usage of all samples relative to that without dropping; None if some number is unknown."""
    numbers, plain = [one for one in used if one is not None], [one for one in vanilla if one is not None]
    return sum(numbers) / sum(plain) if len(numbers) == len(used) and len(plain) == len(vanilla) else None


def profile_of(model: dict[str, Any]) -> dict[str, Any]:
    """The redundancy profile of one model of a study, as `pyramiddrop.planning.Profile` reads it.

    Its score is the accuracy if answers are known, else the agreement of whole answers with the full model's.
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
