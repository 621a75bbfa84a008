"""Owns the picture of the paper's Table 4: what λ costs and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.report.studies.paper_figure import COLORS, DASHES, MARKERS, PAGE, band, literal, styled
from pyramiddrop.report.studies.study import Record, bounds

#: What is drawn of the costs, by their names in `costs_of`.
COSTS = {"flops": "decoder FLOPs", "kv": "KV cache", "tokens": "visual tokens of a layer"}
#: λ of vanilla: each drop would leave everything.
VANILLA = 1.0


def draw_ablation(vanilla: Record, points: Sequence[Record], kinds: Sequence[str]) -> Figure:
    """Left the score, of all and of each kind of question, over λ; right the costs. Vanilla stands at λ = 1.

    Args:
        vanilla: a way of an evaluation's record.
        points: ways, each with its `lam`, ascending.
    """
    places = [*(point["lam"] for point in points), VANILLA]
    with rc_context(styled()):
        figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_scores(left, places, [*points, vanilla], kinds)
        _draw_costs(right, places, [costs_of(point, vanilla) for point in [*points, vanilla]])
        left.set_ylabel("accuracy (%)")
        right.set_ylabel("of vanilla (%)")
        for axis in (left, right):
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.set_xlabel("λ, the share that each drop leaves (1: vanilla)")
            axis.grid(axis="y")
            axis.set_axisbelow(True)
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def costs_of(way: Record, vanilla: Record) -> dict[str, float | None]:
    """Parts of vanilla's FLOPs, KV cache and visual tokens of a layer; None where the cost model does not know them."""
    tokens = way["visual_tokens"]["per_layer"] / vanilla["visual_tokens"]["per_layer"]
    return {"flops": way["flops_ratio"], "kv": way["kv_ratio"], "tokens": tokens}


def _draw_scores(axis: Axes, places: Sequence[float], ways: Sequence[Record], kinds: Sequence[str]) -> None:
    for number, kind in enumerate(kinds if len(kinds) > 1 else ()):
        low, middle, high = bounds([way["scores"][kind] for way in ways])
        band(axis, places, low, high, COLORS[number % len(COLORS)])
        axis.plot(places, middle, label=literal(kind), linewidth=0.8, **_style(number))
    low, middle, high = bounds([way["scores"]["all"] for way in ways])
    band(axis, places, low, high, "black")
    axis.plot(places, middle, color="black", marker="o", linewidth=1.8, label="all")


def _draw_costs(axis: Axes, places: Sequence[float], costs: Sequence[Mapping[str, float | None]]) -> None:
    for number, (name, label) in enumerate(COSTS.items()):
        values = [100 * value for one in costs if (value := one[name]) is not None]
        if len(values) == len(places):
            axis.plot(places, values, label=label, **_style(number))


def _style(number: int) -> Mapping[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }
