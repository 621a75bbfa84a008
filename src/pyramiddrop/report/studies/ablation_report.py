"""Owns what the ablation shows: scores and costs by λ, and the paper's Table 4 beside."""

from __future__ import annotations

from collections.abc import Sequence

from pyramiddrop.evaluation.paper.tables import PaperRow, paper_tables
from pyramiddrop.report.studies.ablation_plot import draw_ablation
from pyramiddrop.report.studies.study import Plot, Record, Sheet, Shown
from pyramiddrop.report.studies.tradeoff_report import kind_sheet, scored_cells, way_numbers
from pyramiddrop.report.tables.evaluation import share_cell

#: The number of the paper's table.
ABLATION = 4
LEAD = (
    "PyramidDrop in 4 equal stages: after drop k the share λ^k of the visual tokens stays. A smaller λ is cheaper. "
    "Bands and ± are one standard error, clustered by picture."
)


def show_ablation(record: Record) -> Shown:
    """The figure and the tables of a study's `record`."""
    vanilla, *points = record["methods"]
    figure = draw_ablation(vanilla, points, record["kinds"])
    return Shown(
        title="What does λ cost, and what does it save?",
        lead=LEAD,
        plots=[Plot("ablation", "Accuracy, and costs of vanilla's, over λ.", figure)],
        sheets=ablation_sheets(record),
        remarks=[
            f"{record['model']}: {record['task']['questions']} questions about {record['pictures']} pictures.",
            "The paper trains its models with each λ; here the same weights answer under each.",
        ],
        numbers=[row for way in record["methods"] for row in way_numbers(way, {"lam": way.get("lam", "")})],
    )


def ablation_sheets(record: Record) -> list[Sheet]:
    """The tables: what each λ costs and scores, its scores by kind of question, and the paper's beside."""
    ways = record["methods"]
    vanilla, *points = ways
    names = ["vanilla", *(f"{point['lam']:g}" for point in points)]
    head = ("λ", "decoder FLOPs", "KV cache", "accuracy (%)", "minus vanilla", "visual tokens of a layer")
    tokens = [f"{way['visual_tokens']['per_layer']:.1f}" for way in ways]
    rows = [(name, *scored_cells(way), count) for name, way, count in zip(names, ways, tokens, strict=True)]
    beside = _beside_the_paper(record["model"], vanilla, points)
    return [Sheet("as measured", head, rows), *kind_sheet(names, ways, record["kinds"]), beside]


def _beside_the_paper(name: str, vanilla: Record, points: Sequence[Record]) -> Sheet:
    """Costs and scores as parts of vanilla's own, here and in the paper's Table 4: what can be compared over models."""
    paper = next(table.rows for table in paper_tables() if table.number == ABLATION)
    models = list(dict.fromkeys(row.settings["model"] for row in paper))
    rows = []
    for point in points:
        whole = vanilla["scores"]["all"]["mean"]
        score = point["scores"]["all"]["mean"] / whole if whole else None
        theirs = [cell for model in models for cell in _paper_cells(paper, model, point["lam"])]
        rows.append((f"{point['lam']:g}", share_cell(point["flops_ratio"]), share_cell(score), *theirs))
    head = [f"{model}: {what}" for model in (name, *models) for what in ("FLOPs", "score")]
    return Sheet("of vanilla's, beside the paper's Table 4", ("λ", *head), rows)


def _paper_cells(rows: Sequence[PaperRow], model: str, lam: float) -> tuple[str, str]:
    """FLOPs and average score; empty where the paper did not try this λ."""
    own = {row.settings["lambda"]: row for row in rows if row.settings["model"] == model}
    tried, vanilla = own.get(f"{lam:g}"), own["vanilla"]
    if tried is None:
        return "", ""
    cost, score = float(tried.tflops) / float(vanilla.tflops), float(tried.average) / float(vanilla.average)
    return share_cell(cost), share_cell(score)
