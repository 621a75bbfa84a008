"""The paper's tables on the terminal, beside measured scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from pyramiddrop.evaluation.lmms.run import Measured
from pyramiddrop.evaluation.paper.tables import (
    COLUMNS,
    PaperRow,
    PaperTable,
    PublishedRow,
    benchmark_name,
    paper_benchmarks,
    paper_tables,
    published_rows,
)
from pyramiddrop.report.tables import new_table
from pyramiddrop.report.tables.evaluation import folded

Record = Mapping[str, Any]


def suite_tables(record: Record) -> Iterator[str | Table]:
    """A title and a table for each model in each of the paper's tables."""
    for table in paper_tables():
        for model, rows in groupby(table.rows, lambda row: row.model):
            yield f"{table.title}. {model}"
            yield _beside(table, list(rows), record["measured"])


def budget_tables(record: Record) -> Iterator[str | Table]:
    """The measured scores, then a title and a table of published scores for each model and budget."""
    if record["measured"]:
        yield "Measured"
        yield _measured_table(record["measured"])
    for (model, budget, unit), rows in groupby(published_rows(), lambda row: (row.model, row.budget, row.unit)):
        yield f"{model} at {budget:g} {unit}"
        yield _published_table(list(rows))
    yield (
        '* read in notes about the paper. "Average tokens" is a mean over layers for methods that drop inside the '
        "decoder, and a plain count for those that drop before it. % of full: over each source's own benchmarks."
    )


def _published_table(rows: Sequence[PublishedRow]) -> Table:
    columns = [column for column in COLUMNS if any(column in row.scores for row in rows)]
    names = map(benchmark_name, columns)
    table = new_table("method", "who printed it", *names, "mean", "% of full", "schedule", "note")
    for row in rows:
        trained = {"no": "", "yes": ", trained"}.get(row.trained, f", {row.trained} trained")
        mean = f"{row.mean} of {row.full}" if row.mean else ""
        source = f"{row.source} ({row.version}){' *' if row.second_hand else ''}"
        scores = [row.scores.get(column, "") for column in columns]
        table.add_row(row.method + trained, source, *scores, mean, row.percent, row.schedule, row.note)
    return table


def _measured_table(measured: Sequence[Record]) -> Table:
    columns = [column for column in COLUMNS if any(column in one["scores"] for one in measured)]
    table = new_table("method", *map(benchmark_name, columns), "visual tokens a layer", "FLOPs")
    for one in measured:
        tokens, ratio = (one["costs"].get(name) for name in ("retained_visual_tokens", "flops_ratio"))
        scores = [f"{one['scores'][column]:.1f}" if column in one["scores"] else "" for column in columns]
        costs = "" if tokens is None else f"{tokens:.0f}", "" if ratio is None else f"{100 * ratio:.0f} % of vanilla"
        table.add_row(folded(one["name"]), *scores, *costs)
    return table


def tasks_table() -> Table:
    """The paper's benchmarks and the tasks that measure them."""
    rows = [(one.name, one.task or "none", one.metric, one.note) for one in paper_benchmarks().values()]
    return new_table("benchmark", "task of lmms-eval 0.7", "metric", "note", rows=rows)


def benchmarks_table(measured: Sequence[Measured]) -> Table:
    """The scores that lmms-eval measured under each method, in its own units."""
    table = new_table("task", "metric", *(folded(one.name) for one in measured))
    named = [(task, metric) for one in measured for task, metrics in one.scores.items() for metric in metrics]
    for task, metric in dict.fromkeys(named):
        scores = [one.scores.get(task, {}).get(metric) for one in measured]
        table.add_row(task, metric, *("" if score is None else _written(score.value, score.error) for score in scores))
    for cost in dict.fromkeys(name for one in measured for name in one.costs):
        costs = [f"{one.costs[cost]:.4g}" if cost in one.costs else "" for one in measured]
        table.add_row("all requests", cost, *costs)
    return table


def _beside(table: PaperTable, rows: Sequence[PaperRow], measured: Sequence[Record]) -> Table:
    heads = [f"paper\n{row.variant}".replace(", ", "\n") for row in rows]
    heads += [f"measured\n{folded(one['name'])}".replace(", ", "\n") for one in measured]
    shown = new_table("", *heads)
    for benchmark in table.benchmarks:
        found = [one["scores"].get(benchmark.column) for one in measured]
        scores = ["" if score is None else _written(score["value"], score["error"]) for score in found]
        shown.add_row(benchmark.name, *(row.scores[benchmark.column] for row in rows), *scores)
    averages = [one["averages"].get(str(table.number)) for one in measured]
    shown.add_row("average", *(row.average for row in rows), *("" if one is None else f"{one:.1f}" for one in averages))
    ratios = [one["costs"].get("flops_ratio") for one in measured]
    costs = ("" if ratio is None else f"{100 * ratio:.1f} % of vanilla" for ratio in ratios)
    if any(row.tflops for row in rows) or any(ratios):
        shown.add_row("inference TFLOPs", *(row.tflops for row in rows), *costs)
    return shown


def _written(value: float, error: float | None) -> str:
    digits = 1 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
