"""Report the ablation of λ: scores and costs by λ beside the paper's Table 4."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.evaluation.paper.tables import PaperRow, paper_tables
from pyramiddrop.report.studies.paper_figure import PAGE, line_style, literal, styled
from pyramiddrop.report.studies.study import Plot, Record, Sheet, Shown, from_vanilla, plot_scores
from pyramiddrop.report.studies.tradeoff import kind_sheet, scored_cells, way_numbers
from pyramiddrop.report.tables.evaluation import share_cell

LEAD = (
    "PyramidDrop in 4 equal stages: after drop k the share λ^k of the visual tokens stays. A smaller λ is cheaper. "
    "Bands and ± are one standard error, clustered by picture."
)


def show_ablation(record: Record) -> Shown:
    """Build the figure and the tables of a study's `record`."""
    vanilla, *points = record["methods"]
    figure = draw_ablation(vanilla, points, record["kinds"])
    return Shown(
        title="What does λ cost, and what does it save?",
        conclusion=_conclusion(vanilla, points),
        lead=LEAD,
        plots=[Plot("ablation", "Accuracy, and costs of vanilla's, over λ.", figure)],
        sheets=ablation_sheets(record),
        remarks=[
            f"{record['model']}: {record['task']['questions']} questions about {record['pictures']} pictures.",
            "The paper trains its models with each λ; here the same weights answer under each.",
        ],
        numbers=[row for variant in record["methods"] for row in way_numbers(variant, {"lam": variant.get("lam", "")})],
    )


def _conclusion(vanilla: Record, points: Sequence[Record]) -> str:
    """A sentence on the costs and losses of the smallest and the largest λ."""
    mean = vanilla["scores"]["all"]["mean"]
    said = [
        f"λ = {point['lam']:g} spends {share_cell(point['flops_ratio'])} of vanilla's decoder FLOPs and scores "
        f"{from_vanilla(mean, point['scores']['all']['mean'])}"
        for point in points
    ]
    return "; ".join(dict.fromkeys([said[0], said[-1]])) + "."


def ablation_sheets(record: Record) -> list[Sheet]:
    """The tables: costs and scores of each λ, its scores by kind of question, and the paper's table."""
    variants = record["methods"]
    vanilla, *points = variants
    names = ["vanilla", *(f"{point['lam']:g}" for point in points)]
    head = ("λ", "decoder FLOPs", "KV cache", "accuracy (%)", "minus vanilla", "visual tokens of a layer")
    tokens = [f"{variant['visual_tokens']['per_layer']:.1f}" for variant in variants]
    rows = [(name, *scored_cells(variant), count) for name, variant, count in zip(names, variants, tokens, strict=True)]
    beside = _beside_the_paper(record["model"], vanilla, points)
    return [Sheet("as measured", head, rows), *kind_sheet(names, record), beside]


def _beside_the_paper(name: str, vanilla: Record, points: Sequence[Record]) -> Sheet:
    """Costs and scores relative to vanilla's, here and in the paper's Table 4, to compare across models."""
    paper = next(table.rows for table in paper_tables() if table.number == 4)
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
    """FLOPs and average score in the paper; empty if it did not try this λ."""
    own = {row.settings["lambda"]: row for row in rows if row.settings["model"] == model}
    tried, vanilla = own.get(f"{lam:g}"), own["vanilla"]
    if tried is None:
        return "", ""
    cost, score = float(tried.tflops) / float(vanilla.tflops), float(tried.average) / float(vanilla.average)
    return share_cell(cost), share_cell(score)


def draw_ablation(vanilla: Record, points: Sequence[Record], kinds: Sequence[str]) -> Figure:
    """Draw scores over λ (left: of all questions and of each kind) and costs (right). Vanilla is at λ = 1.

    `vanilla` and the `points`, each with its `lam`, ascending, are entries of an evaluation's record.
    """
    places = [*(point["lam"] for point in points), 1.0]
    with rc_context(styled()):
        figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_scores(left, places, [*points, vanilla], kinds)
        _draw_costs(right, places, [*points, vanilla])
        left.set_ylabel("accuracy (%)")
        right.set_ylabel("of vanilla (%)")
        for axis in (left, right):
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.set_xlabel("λ, the share that each drop leaves (1: vanilla)")
            axis.grid(axis="y")
            axis.set_axisbelow(True)
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_scores(axis: Axes, places: Sequence[float], variants: Sequence[Record], kinds: Sequence[str]) -> None:
    for number, kind in enumerate(kinds if len(kinds) > 1 else ()):
        scores = [variant["scores"][kind] for variant in variants]
        plot_scores(axis, places, scores, label=literal(kind), linewidth=0.8, **line_style(number))
    scores = [variant["scores"]["all"] for variant in variants]
    plot_scores(axis, places, scores, label="all", linewidth=1.8, color="black", marker="o")


def _draw_costs(axis: Axes, places: Sequence[float], variants: Sequence[Record]) -> None:
    """Draw the costs of the `variants`, of which vanilla is the last, unless the cost model does not know them."""
    tokens = [variant["visual_tokens"]["per_layer"] for variant in variants]
    costs = {
        "decoder FLOPs": [variant["flops_ratio"] for variant in variants],
        "KV cache": [variant["kv_ratio"] for variant in variants],
        "visual tokens of a layer": [count / tokens[-1] for count in tokens],
    }
    for number, (label, values) in enumerate(costs.items()):
        if None not in values:
            axis.plot(places, [100 * value for value in values], label=label, **line_style(number))
