"""The paper's Tables 1 to 5 as data, the tasks of lmms-eval that measure them, and measured scores beside them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.benchmarks import Measured, TaskScore

_FOLDER = Path(__file__).parent
#: MME's perception score is a sum, which averages take in percent of this value.
_MME, _MME_MOST = "mme", 2000
TITLES = {
    1: "Trained and asked with and without PyramidDrop",
    2: "Trained and asked with and without PyramidDrop, fine-grained benchmarks",
    3: "FastV on models trained with and without PyramidDrop",
    4: "Ablation of λ",
    5: "Training-free inference",
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper.

    Attributes:
        column: its name in the tables.
        name: its name in the paper.
        task: its task in lmms-eval 0.7; empty if there is none.
        metric: lmms-eval's name of the printed metric.
        scale: the factor that converts it to the paper's unit.
        note: a note about the task.
    """

    column: str
    name: str
    task: str
    metric: str
    scale: float
    note: str


@dataclass(frozen=True)
class PaperRow:
    """A row: its `settings` (the columns that are not scores), and its scores by column, as printed."""

    settings: Mapping[str, str]
    scores: Mapping[str, str]
    average: str

    @property
    def model(self) -> str:
        """The model and, if the table has them, its crops."""
        patches = self.settings.get("patches")
        return self.settings["model"] + (f", patches: {patches}" if patches else "")

    @property
    def variant(self) -> str:
        """The methods in training and inference."""
        told = self.settings
        if told.get("lambda", "vanilla") != "vanilla":
            return f"λ = {told['lambda']}"
        if "train" in told:
            return f"trained {told['train']}, asked {told['infer']}"
        return next(told[name] for name in ("lambda", "infer", "train_and_infer") if name in told)

    @property
    def tflops(self) -> str:
        """TFLOPs of inference; empty if the table does not have them."""
        return self.settings.get("infer_tflops", "")


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    number: int
    benchmarks: tuple[Benchmark, ...]
    rows: tuple[PaperRow, ...]

    @property
    def title(self) -> str:
        """Its number and subject."""
        return f"Table {self.number}: {TITLES[self.number]}"

    def as_dict(self) -> dict[str, Any]:
        """The table as plain values, with numbers as numbers."""
        rows = [
            {
                **row.settings,
                "scores": {column: float(score) for column, score in row.scores.items()},
                "average": float(row.average),
            }
            for row in self.rows
        ]
        return {"table": self.number, "title": TITLES[self.number], "rows": rows}


@cache
def paper_benchmarks() -> dict[str, Benchmark]:
    """The paper's benchmarks by column: its 14, and ScienceQA of Tables 3 and 5."""
    rows = _read("benchmarks")
    return {row["column"]: Benchmark(**{**row, "scale": float(row["scale"] or 1)}) for row in rows}  # type: ignore[arg-type]


@cache
def paper_tables() -> tuple[PaperTable, ...]:
    """The paper's Tables 1 to 5."""
    return tuple(_table(number) for number in TITLES)


def average(scores: Mapping[str, float]) -> float:
    """The mean of scores by column, with MME in percent of 2000, as in the paper."""
    points = [100 * score / _MME_MOST if column == _MME else score for column, score in scores.items()]
    return sum(points) / len(points)


def _table(number: int) -> PaperTable:
    known, rows = paper_benchmarks(), _read(f"table{number}")
    columns = [column for column in rows[0] if column in known]
    return PaperTable(
        number,
        tuple(known[column] for column in columns),
        tuple(
            PaperRow(
                settings={name: value for name, value in row.items() if name not in columns and name != "avg"},
                scores={column: row[column] for column in columns},
                average=row["avg"],
            )
            for row in rows
        ),
    )


def _read(name: str) -> list[dict[str, str]]:
    with (_FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def suite_record(measured: Sequence[Measured]) -> dict[str, Any]:
    """The benchmarks with their tasks, the paper's tables, and each measured method in the paper's units."""
    return {
        "suite": "paper",
        "benchmarks": [asdict(benchmark) for benchmark in paper_benchmarks().values()],
        "tables": [table.as_dict() for table in paper_tables()],
        "measured": [_beside(one) for one in measured],
    }


def scores_by_column(one: Measured) -> dict[str, TaskScore]:
    """The measured scores on the paper's benchmarks, in its units."""
    return {column: score for column, benchmark in paper_benchmarks().items() if (score := _score(one, benchmark))}


def _beside(one: Measured) -> dict[str, Any]:
    """The scores by the paper's columns, and the average of each completely measured table."""
    found = scores_by_column(one)
    values = {column: score.value for column, score in found.items()}
    averages = {
        str(table.number): average({column: values[column] for column in columns})
        for table in paper_tables()
        if set(columns := [benchmark.column for benchmark in table.benchmarks]) <= set(values)
    }
    return {
        "name": one.name,
        "scores": {column: asdict(score) for column, score in found.items()},
        "averages": averages,
        "costs": dict(one.costs),
    }


def _score(one: Measured, benchmark: Benchmark) -> TaskScore | None:
    """The measured score on the benchmark, in the paper's unit."""
    score = one.scores.get(benchmark.task, {}).get(benchmark.metric)
    if score is None:
        return None
    return TaskScore(score.value * benchmark.scale, None if score.error is None else score.error * benchmark.scale)
