"""Owns the record of a redundancy study: what its pieces come to, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyramiddrop.evaluation.matching import MATCHES
from pyramiddrop.evaluation.studies.grid import Grid
from pyramiddrop.evaluation.studies.means import Means, ratio
from pyramiddrop.evaluation.tasks import Task

Piece = Mapping[str, Any]

#: What is scored without answers, against the full model: whole answers, the likeliest next token, its distribution.
LABEL_FREE = ("agreement", "top1", "kl")


def redundancy_record(task: Task, grid: Grid, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The scores of the full model and of every cell, and the attention by layer.

    Args:
        pieces: of `Redundancy`, a batch each, in the order of the samples.
    """
    means, full = Means(task.samples), _joined(pieces, "answers")
    right = _right(task, full)
    vanilla_flops = _joined(pieces, "flops")
    cells = []
    for place, (layer, keep) in enumerate(grid.cells):
        parts = [piece["cells"][place] for piece in pieces]
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
        "visual_tokens": float(np.mean(_joined(pieces, "visual_tokens"))),
        "shared_prefix": all(piece["shared"] for piece in pieces),
        "vanilla": {"accuracy": means.score(right), "by_kind": means.by_kind(right)},
        "cells": cells,
        "attention": _attention(means, [piece["attention"] for piece in pieces]),
    }


def _right(task: Task, answers: Sequence[str]) -> list[float | None]:
    """What each answer scores; None where no right answer is known."""
    match, pairs = MATCHES[task.match], zip(answers, task.samples, strict=True)
    return [match(answer, sample.answers) if sample.answers else None for answer, sample in pairs]


def _attention(means: Means, pieces: Sequence[Sequence[Piece]]) -> list[dict[str, Any]]:
    """By layer; nothing where the prompts of some piece had too few visual tokens for any ranking."""
    layers = zip(*pieces, strict=True) if all(pieces) else ()
    return [
        {"layer": looks[0]["layer"], **{name: means.score(_joined(looks, name)) for name in ("picture", "crowd")}}
        for looks in layers
    ]


def _joined(pieces: Sequence[Piece], name: str) -> list[Any]:
    return [value for piece in pieces for value in piece[name]]
