"""The style of figures for papers: sizes, type, colours for colour-blind readers, and file formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

#: Inches: a column of a two-column paper, and its full width.
COLUMN, PAGE = 3.4, 6.9
#: Okabe and Ito's colours, without black (which is vanilla's) and without yellow (which is too light for lines).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 2)))
_STYLE = {
    "font.family": "sans-serif",
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 7.5),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), 7),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "svg.fonttype": "none",  # keep text as text, so that it can be searched and edited
    "svg.hashsalt": "pyramiddrop",
}


def styled() -> matplotlib.RcParams:
    """Matplotlib's settings for figures of a paper: `with rc_context(styled())`."""
    return matplotlib.RcParams(**(dict(matplotlib.rcParamsDefault) | _STYLE))


def depth_colors(count: int) -> list[str]:
    """Colours for ordered things (layers, shares), dark to light, also in grey prints."""
    ramp = colormaps["viridis"]
    return [to_hex(ramp(0.88 * place / max(1, count - 1))) for place in range(count)]


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of this number."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def panels(count: int, columns: int, width: float, top: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels with shared axes, and tick labels below the lowest panel of each column.

    It is `width` inches wide, and has `top` inches above its rows of at most `columns` panels, `height` inches each.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, top + height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for place, axis in enumerate(axes):
        axis.set_visible(place < count)
        axis.tick_params(labelbottom=place + columns >= count)
    return figure, axes[:count]


def literal(text: str) -> str:
    """Escape dollar signs in a label, so that matplotlib does not read them as formulas."""
    return text.replace("$", r"\$")


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `figure` as NAME.png (300 dots per inch) and NAME.svg; returns the path of the latter."""
    left_out = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # so that a file depends only on its content
    with rc_context(styled()):
        figure.savefig(folder / f"{name}.png", facecolor="white", dpi=300)
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata=left_out)
    return folder / f"{name}.svg"
