"""Draw the curves of the paper's Figures 1 and 3, a score over the keep ratio by layer, and its attention maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pyramiddrop.report.pictures.overlay import seen_pixels
from pyramiddrop.report.studies.paper_figure import COLUMN, PAGE, depth_colors, line_style, literal, panels, styled
from pyramiddrop.report.studies.study import Record, plot_scores
from pyramiddrop.report.token_layout.geometry import View
from pyramiddrop.report.token_layout.views import PlacedView


@dataclass(frozen=True)
class Metric:
    """How a metric of the study is shown.

    Attributes:
        label: the label of its axis.
        caption: the caption of its figure.
        full: its value without dropping; None: the one in the record.
        part: True if it lies in 0..1 and is shown in percent; others are shown on a logarithmic axis.
    """

    label: str
    caption: str
    full: float | None = None
    part: bool = True


METRICS = {
    "accuracy": Metric(
        "accuracy (%)",
        "Accuracy over the share of visual tokens that one drop keeps, by the layer before which it drops.",
    ),
    "agreement": Metric(
        "answers as the full model's (%)",
        "Whole greedy answers that stay the same as the full model's. Needs no right answers.",
        full=1.0,
    ),
    "top1": Metric(
        "next token as the full model's (%)",
        "Prompts whose likeliest next token stays the full model's. Needs no right answers.",
        full=1.0,
    ),
    "kl": Metric(
        "KL from the full model (nats)",
        "Kullback-Leibler divergence of the next-token distribution from the full model's, which is 0 at 100 %. Needs "
        "no right answers.",
        full=0.0,
        part=False,
    ),
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
        _line(axis, model, metric, layer, label=str(layer), color=color, marker=line_style(place)["marker"])
    axis.legend(title="drop before\nlayer", loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3)
    _finish(axis, [model], metric)
    axis.set_ylabel(METRICS[metric].label)
    return figure


def _several_models(models: Sequence[Record], metric: str) -> Figure:
    layers = _layers(models)
    figure, axes = panels(len(layers), columns=4, width=PAGE if len(layers) > 2 else COLUMN, top=0.5, height=1.55)
    for place, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        for number, model in enumerate(models):
            _line(axis, model, metric, layer, label=literal(model["name"]), **line_style(number))
        axis.set_title(f"drop before layer {layer}", loc="left")
        _finish(axis, models, metric)
        if place + 4 < len(layers):
            axis.set_xlabel("")
    figure.supylabel(METRICS[metric].label, fontsize=7.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models))
    return figure


def _line(axis: Axes, model: Record, metric: str, layer: int, **style: Any) -> None:
    """Draw a line through the cells of `layer`, with the full model at the right and a band of one standard error."""
    full, part = METRICS[metric].full, METRICS[metric].part
    scores = {cell["keep"]: cell[metric] for cell in model["cells"] if cell["layer"] == layer and cell["keep"] < 1}
    scores[1.0] = model["vanilla"][metric] if full is None else {"mean": full, "error": 0.0}
    shares = sorted(share for share, score in scores.items() if part or score["mean"] > 0)  # log axes have no zero
    plot_scores(axis, shares, [scores[share] for share in shares], part, clip_on=False, **style)


def _finish(axis: Axes, models: Sequence[Record], metric: str) -> None:
    shares = sorted({cell["keep"] for model in models for cell in model["cells"]} | {1.0})
    axis.set_xscale("log", base=2)
    axis.set_xticks(shares, [f"{100 * share:.3g}" for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("visual tokens kept (%)")
    if not METRICS[metric].part:
        axis.set_yscale("log")
    axis.grid(axis="y")
    axis.set_axisbelow(True)


def _layers(models: Sequence[Record]) -> list[int]:
    return sorted({cell["layer"] for model in models for cell in model["cells"]})


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one prompt on its visual tokens.

    Attributes:
        title: the question, and the answer.
        seen: the views of its pictures; the first one is drawn.
        scores: layer -> (N,) the attention on each visual token.
    """

    title: str
    seen: Sequence[PlacedView]
    scores: Mapping[int, NDArray[np.float64]]


def draw_attention(looks: Sequence[AttentionMaps]) -> Figure:
    """Draw a row for each prompt: the picture, then a map for each layer.

    The maps of a row share their colours, from 0 to the highest attention in any of its layers. Colours follow the
    square root, so that small values are visible.
    """
    columns = 1 + len(looks[0].scores)
    side = PAGE / columns
    heights = [side * one.seen[0].view.box.height / one.seen[0].view.box.width + 0.42 for one in looks]
    with rc_context(styled()):
        figure = Figure(figsize=(PAGE, sum(heights)), layout="constrained")
        rows = figure.subfigures(len(looks), 1, squeeze=False, height_ratios=heights)[:, 0]
        for row, one in zip(rows, looks, strict=True):
            _draw_row(row.subplots(1, columns), one)
            row.suptitle(one.title, x=0.01, ha="left", fontsize=7.5, parse_math=False)
    return figure


def _draw_row(axes: Sequence[Axes], one: AttentionMaps) -> None:
    view, pixels = one.seen[0].view, seen_pixels(one.seen[0].picture, one.seen[0].view)
    _panel(axes[0], pixels, "picture")
    grey, most = pixels.convert("L").convert("RGB"), max(float(scores.max()) for scores in one.scores.values())
    for axis, (layer, scores) in zip(axes[1:], one.scores.items(), strict=True):
        strength = np.sqrt(spread(scores, view) / most)
        _panel(axis, grey, f"layer {layer}: {100 * scores.sum():.0f} %")
        box = (0, pixels.width, pixels.height, 0)
        axis.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=0.1 + 0.55 * strength, extent=box, zorder=2)


def spread(scores: NDArray[np.float64], view: View) -> NDArray[np.float64]:
    """(rows, columns) the `scores` (N,) at the places of the first `view`, without tokens that have no place."""
    heat = np.zeros((view.rows, view.columns))
    for cell, score in zip(view.cells, scores, strict=False):
        if cell is not None:
            heat[cell] = score
    return heat


def _panel(axis: Axes, pixels: Image.Image, title: str) -> None:
    axis.imshow(pixels, extent=(0, pixels.width, pixels.height, 0))
    axis.set_title(title, fontsize=7, pad=2)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
