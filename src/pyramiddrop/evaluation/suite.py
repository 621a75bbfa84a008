"""Owns the paper's suite: its tables with what was measured of the same benchmarks beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pyramiddrop.evaluation.benchmarks import Measured, TaskScore
from pyramiddrop.evaluation.paper.tables import Benchmark, average, paper_benchmarks, paper_tables


def suite_record(measured: Sequence[Measured]) -> dict[str, Any]:
    """The benchmarks with their tasks, the paper's tables, and each measured method in the paper's units."""
    return {
        "suite": "paper",
        "benchmarks": [asdict(benchmark) for benchmark in paper_benchmarks().values()],
        "tables": [table.as_dict() for table in paper_tables()],
        "measured": [_beside(one) for one in measured],
    }


def _beside(one: Measured) -> dict[str, Any]:
    """The scores by the paper's columns, and the average of each table that was measured as a whole."""
    found = {column: score for column, benchmark in paper_benchmarks().items() if (score := _score(one, benchmark))}
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
    """What was measured of the benchmark, in the paper's unit."""
    score = one.scores.get(benchmark.task, {}).get(benchmark.metric)
    if score is None:
        return None
    return TaskScore(score.value * benchmark.scale, None if score.error is None else score.error * benchmark.scale)
