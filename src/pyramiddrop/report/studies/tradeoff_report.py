"""Owns what the trade-off study shows: scores over decoder FLOPs for several methods, and the table of every point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pyramiddrop.report.studies.study import Plot, Record, Sheet, Shown
from pyramiddrop.report.studies.tradeoff_plot import draw_tradeoff, draw_tradeoff_by_kind
from pyramiddrop.report.tables.evaluation import difference_cell, score_cell, share_cell

LEAD = (
    "Every method's shares are solved so that it spends the same part of vanilla's decoder FLOPs, ranking included, or "
    "just less. Bands and ± are one standard error, clustered by picture; differences are paired, question by "
    "question, with the 95 % interval of a bootstrap over pictures."
)


def show_tradeoff(record: Record) -> Shown:
    """The figures and the table of a study's `record`."""
    vanilla, *points = record["methods"]
    kinds = record["kinds"]
    plots = [Plot("tradeoff", "Accuracy over what the decoder computes in a prefill.", draw_tradeoff(vanilla, points))]
    if len(kinds) > 1:
        by_kind = draw_tradeoff_by_kind(vanilla, points, kinds)
        plots.append(Plot("tradeoff-by-kind", "The same for each kind of question.", by_kind))
    return Shown(
        title="What does a method keep of the answers, at equal cost?",
        lead=LEAD,
        plots=plots,
        sheets=tradeoff_sheets(record),
        remarks=[f"{record['model']}: {record['task']['questions']} questions about {record['pictures']} pictures."],
        numbers=[row for way in record["methods"] for row in way_numbers(way, {"line": way.get("line", "vanilla")})],
    )


def way_numbers(way: Record, about: Record) -> Iterator[dict[str, Any]]:
    """Rows of the CSV file for one way: one for each kind of question."""
    costs = {name: way[name] for name in ("percent", "flops", "flops_ratio", "kv_bytes", "kv_ratio")}
    tokens = way["visual_tokens"]["per_layer"]
    for kind, score in way["scores"].items():
        yield {**about, "method": way["name"], **costs, "tokens_per_layer": tokens, "kind": kind, **score}


def kind_sheet(heads: Sequence[str], ways: Sequence[Record], kinds: Sequence[str]) -> list[Sheet]:
    """Mean scores by kind of question, a row a way with its head; no table where there is one kind."""
    if len(kinds) < 2:
        return []
    rows = [
        (head, *(f"{100 * way['scores'][kind]['mean']:.0f}" for kind in kinds))
        for head, way in zip(heads, ways, strict=True)
    ]
    return [Sheet("by kind of question (%; errors are in the CSV file)", ("", *kinds), rows)]


def tradeoff_sheets(record: Record) -> list[Sheet]:
    """The tables: what each way costs and scores, and its scores by kind of question."""
    ways = record["methods"]
    head = ("method", "decoder FLOPs", "KV cache", "accuracy (%)", "minus vanilla")
    return [
        Sheet("every point", head, [(way["name"], *scored_cells(way)) for way in ways]),
        *kind_sheet([way["name"] for way in ways], ways, record["kinds"]),
    ]


def scored_cells(way: Record) -> tuple[str, ...]:
    """FLOPs and KV cache of vanilla's, the score, and its difference to vanilla's."""
    return (
        share_cell(way["flops_ratio"]),
        share_cell(way["kv_ratio"]),
        score_cell(way["scores"]["all"]),
        difference_cell(way["differences"].get("to_vanilla")),
    )
