"""Draw the curves of the paper's Figures 1 and 3: a score over the keep ratio, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.report.studies.paper_figure import (
    COLORS,
    COLUMN,
    DASHES,
    MARKERS,
    PAGE,
    band,
    depth_colors,
    literal,
    share_axis,
    styled,
)
from pyramiddrop.report.studies.study import Record, bounds


@dataclass(frozen=True)
class Metric:
    """How a metric of the study is shown.

    Attributes:
        label: the label of its axis.
        full: its value without dropping; None: the one in the record.
        part: True if it lies in 0..1 and is shown in percent; others are shown on a logarithmic axis.
    """

    label: str
    full: float | None = None
    part: bool = True


METRICS = {
    "accuracy": Metric("accuracy (%)"),
    "agreement": Metric("answers as the full model's (%)", full=1.0),
    "top1": Metric("next token as the full model's (%)", full=1.0),
    "kl": Metric("KL from the full model (nats)", full=0.0, part=False),
}


def draw_redundancy(models: Sequence[Record], metric: str) -> Figure:
    """Draw `metric`: a line for each layer of one model; for several models, a panel for each layer."""
    with rc_context(styled()):
        return _one_model(models[0], metric) if len(models) == 1 else _several_models(models, metric)


def _one_model(model: Record, metric: str) -> Figure:
    figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
    axis = figure.subplots()
    layers = _layers([model])
    for place, (layer, color) in enumerate(zip(layers, depth_colors(len(layers)), strict=True)):
        style = {"color": color, "marker": MARKERS[place % len(MARKERS)]}
        _line(axis, model, metric, layer, style, str(layer))
    axis.legend(title="drop before\nlayer", loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3)
    _finish(axis, [model], metric)
    axis.set_ylabel(METRICS[metric].label)
    return figure


def _several_models(models: Sequence[Record], metric: str) -> Figure:
    layers = _layers(models)
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(PAGE if columns > 2 else COLUMN, 0.5 + 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        for place, model in enumerate(models):
            style = {
                "color": COLORS[place % len(COLORS)],
                "marker": MARKERS[place % len(MARKERS)],
                "linestyle": DASHES[place % len(DASHES)],
            }
            _line(axis, model, metric, layer, style, literal(model["name"]))
        axis.set_title(f"drop before layer {layer}", loc="left")
        _finish(axis, models, metric)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for place, axis in enumerate(axes.flat):
        if place + columns < len(layers):
            axis.set_xlabel("")
        else:
            axis.tick_params(labelbottom=True)
    figure.supylabel(METRICS[metric].label, fontsize=7.5)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models))
    return figure


def _line(axis: Axes, model: Record, metric: str, layer: int, style: Mapping[str, Any], label: str) -> None:
    """Draw a line through the cells of `layer`, with the full model at the right and a band of one standard error."""
    cells = [cell for cell in model["cells"] if cell["layer"] == layer and cell["keep"] < 1]
    scores = {cell["keep"]: cell[metric] for cell in cells} | {1.0: _full(model, metric)}
    if not METRICS[metric].part:
        scores = {share: score for share, score in scores.items() if score["mean"] > 0}  # log axes have no zero
    shares = sorted(scores)
    low, middle, high = bounds([scores[share] for share in shares], METRICS[metric].part)
    band(axis, shares, low, high, style["color"])
    axis.plot(shares, middle, label=label, clip_on=False, **style)


def _full(model: Record, metric: str) -> Record:
    """The score of the full model."""
    full = METRICS[metric].full
    return model["vanilla"][metric] if full is None else {"mean": full, "error": 0.0}


def _finish(axis: Axes, models: Sequence[Record], metric: str) -> None:
    share_axis(axis, sorted({cell["keep"] for model in models for cell in model["cells"]} | {1.0}))
    if not METRICS[metric].part:
        axis.set_yscale("log")
    axis.grid(axis="y")
    axis.set_axisbelow(True)


def _layers(models: Sequence[Record]) -> list[int]:
    return sorted({cell["layer"] for model in models for cell in model["cells"]})
