"""Report the trade-off study: scores over decoder FLOPs for several methods, and the table of all points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.report.studies.paper_figure import COLUMN, PAGE, line_style, literal, panels, styled
from pyramiddrop.report.studies.study import Plot, Record, Sheet, Shown, bounds, from_vanilla, plot_scores
from pyramiddrop.report.tables.evaluation import difference_cell, score_cell, share_cell

LEAD = (
    "Every method's shares are solved so that it spends the same part of vanilla's decoder FLOPs, ranking included, or "
    "just less. Bands and ± are one standard error, clustered by picture; differences are paired, question by "
    "question, with the 95 % interval of a bootstrap over pictures."
)


def show_tradeoff(record: Record) -> Shown:
    """Build the figures and the table of a study's `record`."""
    vanilla, *points = record["methods"]
    kinds = record["kinds"]
    plots = [Plot("tradeoff", "Accuracy over what the decoder computes in a prefill.", draw_tradeoff(vanilla, points))]
    if len(kinds) > 1:
        by_kind = draw_tradeoff_by_kind(vanilla, points, kinds)
        plots.append(Plot("tradeoff-by-kind", "The same for each kind of question.", by_kind))
    return Shown(
        title="What does a method keep of the answers, at equal cost?",
        conclusion=_conclusion(vanilla, points),
        lead=LEAD,
        plots=plots,
        sheets=tradeoff_sheets(record),
        remarks=[f"{record['model']}: {record['task']['questions']} questions about {record['pictures']} pictures."],
        numbers=[row for one in record["methods"] for row in way_numbers(one, {"line": one.get("line", "vanilla")})],
    )


def _conclusion(vanilla: Record, points: Sequence[Record]) -> str:
    """A sentence on the best method at the smallest and at the largest budget, beside vanilla."""
    whole, said = vanilla["scores"]["all"]["mean"], []
    for budget in sorted({point["percent"] for point in points}):
        scores = [(point["line"], point["scores"]["all"]["mean"]) for point in points if point["percent"] == budget]
        most = max(mean for _, mean in scores)
        best, beside = " or ".join(line for line, mean in scores if mean == most), from_vanilla(whole, most)
        said.append(f"with {budget:g} % of vanilla's decoder FLOPs {best} keeps most answers right, {beside}")
    text = "; ".join(dict.fromkeys([said[0], said[-1]]))
    return f"{text[0].upper()}{text[1:]}."


def way_numbers(variant: Record, about: Record) -> Iterator[dict[str, Any]]:
    """The rows of one method in the CSV file, one for each kind of question."""
    costs = {name: variant[name] for name in ("percent", "flops", "flops_ratio", "kv_bytes", "kv_ratio")}
    tokens = variant["visual_tokens"]["per_layer"]
    for kind, score in variant["scores"].items():
        yield {**about, "method": variant["name"], **costs, "tokens_per_layer": tokens, "kind": kind, **score}


def kind_sheet(names: Sequence[str], record: Record) -> list[Sheet]:
    """Mean scores by kind of question, with a row for each method; no table if there is only one kind."""
    kinds = record["kinds"]
    if len(kinds) < 2:
        return []
    rows = [
        (name, *(f"{100 * variant['scores'][kind]['mean']:.0f}" for kind in kinds))
        for name, variant in zip(names, record["methods"], strict=True)
    ]
    return [Sheet("by kind of question (%; errors are in the CSV file)", ("", *kinds), rows)]


def tradeoff_sheets(record: Record) -> list[Sheet]:
    """The tables: costs and scores of each method, and its scores by kind of question."""
    head = ("method", "decoder FLOPs", "KV cache", "accuracy (%)", "minus vanilla")
    rows = [(variant["name"], *scored_cells(variant)) for variant in record["methods"]]
    return [Sheet("every point", head, rows), *kind_sheet([name for name, *_ in rows], record)]


def scored_cells(variant: Record) -> tuple[str, ...]:
    """FLOPs and KV cache relative to vanilla's, the score, and its difference to vanilla's."""
    return (
        share_cell(variant["flops_ratio"]),
        share_cell(variant["kv_ratio"]),
        score_cell(variant["scores"]["all"]),
        difference_cell(variant["differences"].get("to_vanilla")),
    )


#: Units of FLOPs, largest first.
UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1.0, "FLOPs"))
COSTS = "decoder FLOPs of the prefill (% of vanilla)"
SCORE = "accuracy (%)"


def draw_tradeoff(vanilla: Record, points: Sequence[Record]) -> Figure:
    """Draw the score of all questions: a line through the `points` of each method, and vanilla's level.

    `vanilla` and the `points`, each with the name of its `line`, are entries of an evaluation's record.
    """
    with rc_context(styled()):
        figure = Figure(figsize=(COLUMN, 2.75), layout="constrained")
        axis = figure.subplots()
        _draw(axis, vanilla, points, "all")
        axis.set(xlabel=COSTS, ylabel=SCORE)
        _label_flops(axis, vanilla["flops"])
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_tradeoff_by_kind(vanilla: Record, points: Sequence[Record], kinds: Sequence[str]) -> Figure:
    """Draw the same for each kind of question, in a panel each."""
    with rc_context(styled()):
        figure, axes = panels(len(kinds), columns=3, width=PAGE, top=0.7, height=1.6)
        for axis, kind in zip(axes, kinds, strict=True):
            _draw(axis, vanilla, points, kind)
            axis.set_title(kind, loc="left", parse_math=False)
        figure.supxlabel(COSTS, fontsize=7.5)
        figure.supylabel(SCORE, fontsize=7.5)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def _draw(axis: Axes, vanilla: Record, points: Sequence[Record], kind: str) -> None:
    for place, line in enumerate(dict.fromkeys(point["line"] for point in points)):
        own = sorted((point for point in points if point["line"] == line), key=lambda point: point["flops_ratio"])
        costs = [100 * point["flops_ratio"] for point in own]
        scores = [point["scores"][kind] for point in own]
        plot_scores(axis, costs, scores, label=literal(line), **line_style(place))
    low, middle, high = bounds([vanilla["scores"][kind]])
    axis.axhspan(low[0], high[0], color="black", alpha=0.08, linewidth=0)
    axis.axhline(middle[0], color="black", linewidth=0.8, linestyle=(0, (1, 1.5)), label="vanilla")
    axis.grid(axis="y")
    axis.set_axisbelow(True)


def _label_flops(axis: Axes, flops: float) -> None:
    """Add an upper axis in FLOPs of a prompt to the lower one in percent."""
    size, unit = next(entry for entry in UNITS if flops >= entry[0])
    one = flops / size / 100
    upper = axis.secondary_xaxis("top", functions=(lambda x: np.multiply(x, one), lambda y: np.divide(y, one)))
    upper.set_xlabel(f"{unit} a prompt")
    upper.spines["top"].set_visible(True)
