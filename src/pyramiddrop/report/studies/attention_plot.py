"""Draw attention maps (the paper's Figure 1, right): the attention on a picture, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pyramiddrop.report.pictures.overlay import seen_pixels
from pyramiddrop.report.studies.paper_figure import PAGE, styled
from pyramiddrop.report.token_layout.geometry import View
from pyramiddrop.report.token_layout.views import PlacedView

HEAT = "inferno"


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
        axis.imshow(strength, cmap=HEAT, vmin=0, vmax=1, alpha=0.1 + 0.55 * strength, extent=box, zorder=2)


def spread(scores: NDArray[np.float64], view: View) -> NDArray[np.float64]:
    """(rows, columns) the `scores` (N,) at the places of the first `view`, without tokens that have no place."""
    heat = np.zeros((view.rows, view.columns))
    for token in range(min(view.tokens, len(scores))):
        cell = view.cell(token)
        if cell is not None:
            heat[cell] = scores[token]
    return heat


def _panel(axis: Axes, pixels: Image.Image, title: str) -> None:
    axis.imshow(pixels, extent=(0, pixels.width, pixels.height, 0))
    axis.set_title(title, fontsize=7, pad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
