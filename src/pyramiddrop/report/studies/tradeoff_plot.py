"""Owns the curves of the paper's Figure 4: scores over what a prefill's decoder computes, a line a method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.report.studies.paper_figure import COLORS, COLUMN, DASHES, MARKERS, PAGE, band, literal, styled
from pyramiddrop.report.studies.study import Record, bounds

#: What FLOPs are counted in, largest first.
UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1.0, "FLOPs"))
COSTS = "decoder FLOPs of the prefill (% of vanilla)"
SCORE = "accuracy (%)"


def draw_tradeoff(vanilla: Record, points: Sequence[Record]) -> Figure:
    """The score of all questions: one line a method through its `points`, and vanilla's score as a level.

    Args:
        vanilla: a way of an evaluation's record.
        points: ways, each with the name of its `line` beside.
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
    """The same for each kind of question, a panel each."""
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    with rc_context(styled()):
        figure = Figure(figsize=(PAGE, 0.7 + 1.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis, kind in zip(axes.flat, kinds, strict=False):
            _draw(axis, vanilla, points, kind)
            axis.set_title(kind, loc="left", parse_math=False)
        for axis in axes.flat[len(kinds) :]:
            axis.set_visible(False)
        for place, axis in enumerate(axes.flat):
            axis.tick_params(labelbottom=place + columns >= len(kinds))
        figure.supxlabel(COSTS, fontsize=7.5)
        figure.supylabel(SCORE, fontsize=7.5)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def _draw(axis: Axes, vanilla: Record, points: Sequence[Record], kind: str) -> None:
    for place, line in enumerate(dict.fromkeys(point["line"] for point in points)):
        own = sorted((point for point in points if point["line"] == line), key=lambda point: point["flops_ratio"])
        costs, color = [100 * point["flops_ratio"] for point in own], COLORS[place % len(COLORS)]
        low, middle, high = bounds([point["scores"][kind] for point in own])
        band(axis, costs, low, high, color)
        marker, dash = MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)]
        axis.plot(costs, middle, color=color, marker=marker, linestyle=dash, label=literal(line))
    low, middle, high = bounds([vanilla["scores"][kind]])
    axis.axhspan(low[0], high[0], color="black", alpha=0.08, linewidth=0)
    axis.axhline(middle[0], color="black", linewidth=0.8, linestyle=(0, (1, 1.5)), label="vanilla")
    axis.grid(axis="y")
    axis.set_axisbelow(True)


def _label_flops(axis: Axes, flops: float) -> None:
    """FLOPs of a prompt above, beside the percents below."""
    size, unit = next(entry for entry in UNITS if flops >= entry[0])
    one = flops / size / 100
    upper = axis.secondary_xaxis("top", functions=(lambda x: np.multiply(x, one), lambda y: np.divide(y, one)))
    upper.set_xlabel(f"{unit} a prompt")
    upper.spines["top"].set_visible(True)
