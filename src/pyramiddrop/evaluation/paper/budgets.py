"""Published scores at fixed budgets of visual tokens as data, with their sources, beside measured ones."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.benchmarks import Measured
from pyramiddrop.evaluation.paper.tables import paper_benchmarks, scores_by_column

_FILE = Path(__file__).parent / "budgets.csv"
#: Benchmarks with scores, by the columns of `benchmarks.csv`; VQAv2 is not among the paper's.
COLUMNS = ("gqa", "mmbench", "mme", "pope", "sqa_image", "vqav2", "textvqa")


@dataclass(frozen=True)
class PublishedRow:
    """Published scores of a method at a budget.

    Attributes:
        budget, unit: such as 64 "average tokens", or 25 "% of the tokens"; papers average over different layers.
        trained: "no", "yes", or which part of the model was trained with the method.
        scores: the scores by benchmark, as printed.
        mean, full: the means over `benchmarks` benchmarks of the method and of the full model; empty if not printed.
        percent: the share of the full model's quality, as printed, or else `mean` in percent of `full`.
        source, version: the publication and its version.
        schedule: the drop layers; "not printed", or empty for methods without any.
        second_hand: True if it was taken from notes about the paper, not from the paper itself.
    """

    model: str
    budget: float
    unit: str
    method: str
    trained: str
    scores: Mapping[str, str]
    mean: str
    full: str
    percent: str
    benchmarks: str
    source: str
    version: str
    schedule: str
    second_hand: bool
    note: str


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All published rows, by model, unit and budget, with PyramidDrop first."""
    with _FILE.open(encoding="utf-8", newline="") as file:
        return tuple(_row(row) for row in csv.DictReader(file))


def _row(row: dict[str, str]) -> PublishedRow:
    scores = {column: row[column] for column in COLUMNS if row[column]}
    rest = {name: value for name, value in row.items() if name not in COLUMNS}
    return PublishedRow(
        **{**rest, "budget": float(row["budget"]), "second_hand": row["second_hand"] == "yes"},  # type: ignore[arg-type]
        scores=scores,
    )


def budgets_record(measured: Sequence[Measured]) -> dict[str, Any]:
    """The published rows, and each measured method in their units."""
    return {
        "suite": "budgets",
        "published": [_as_dict(row) for row in published_rows()],
        "measured": [{"name": one.name, "scores": _by_column(one), "costs": dict(one.costs)} for one in measured],
    }


def _as_dict(row: PublishedRow) -> dict[str, Any]:
    """The row with numbers as numbers, and None for missing ones."""
    numbers = {name: float(text) if (text := getattr(row, name)) else None for name in ("mean", "full", "percent")}
    return {**asdict(row), **numbers, "scores": {column: float(score) for column, score in row.scores.items()}}


def _by_column(one: Measured) -> dict[str, float]:
    found = scores_by_column(one)
    return {column: found[column].value for column in COLUMNS if column in found}


def benchmark_name(column: str) -> str:
    """The benchmark's name as papers write it."""
    known = paper_benchmarks()
    return known[column].name if column in known else "VQAv2"
