"""Published scores at fixed budgets of visual tokens as data, with who printed them, and measured ones beside."""

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
#: Benchmarks of which rows have scores, by the columns of `benchmarks.csv`; VQAv2 is none of the paper's.
COLUMNS = ("gqa", "mmbench", "mme", "pope", "sqa_image", "vqav2", "textvqa")


@dataclass(frozen=True)
class PublishedRow:
    """What somebody printed of a method at a budget.

    Attributes:
        budget, unit: e.g. 64 "average tokens", or 25 "% of the tokens". What papers average over differs.
        trained: whether the model was trained with the method: no, yes, or its part that was.
        scores: by benchmark, as printed.
        mean, full: the mean over `benchmarks` benchmarks, and the untouched model's; empty where not printed.
        percent: of the untouched model's quality, as printed, or `mean` in percent of `full`.
        source, version: who printed it, and where.
        schedule: at which layers tokens go; "not printed", or empty for methods that have none.
        second_hand: whether it was read in notes about the paper, not in it.
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
    """All of them: by model, unit and budget, PyramidDrop first."""
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
    """Numbers where there are numbers, and None where a row has none."""
    numbers = {name: float(text) if (text := getattr(row, name)) else None for name in ("mean", "full", "percent")}
    return {**asdict(row), **numbers, "scores": {column: float(score) for column, score in row.scores.items()}}


def _by_column(one: Measured) -> dict[str, float]:
    found = scores_by_column(one)
    return {column: found[column].value for column in COLUMNS if column in found}


def benchmark_name(column: str) -> str:
    """As papers write it."""
    known = paper_benchmarks()
    return known[column].name if column in known else "VQAv2"
