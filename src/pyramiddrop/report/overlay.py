"""Owns the overlay: the picture with its dropped patches dimmed, one panel a stage (the paper's Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pyramiddrop.report.grid import Cell, View
from pyramiddrop.report.layout import Seen
from pyramiddrop.report.spans import Span

#: Share of a dropped patch's own colour that still shows through the veil.
SHOWS_THROUGH = 0.14
LIGHT_VEIL, DARK_VEIL = 232, 24


def seen_pixels(picture: Image.Image, view: View, long_side: int = 448) -> Image.Image:
    """The part of `picture` that `view` covers, scaled so that every patch is the same whole number of pixels.

    The longer side comes close to `long_side` pixels. What sticks out of the picture is black, as a model pads it.
    """
    box = view.box
    scale = long_side / max(box.width, box.height)
    cell_width = max(1, round(box.width * scale / view.columns))
    cell_height = max(1, round(box.height * scale / view.rows))
    left, top = math.floor(box.left), math.floor(box.top)
    part = picture.convert("RGB").crop((left, top, math.ceil(box.right), math.ceil(box.bottom)))
    inner = (box.left - left, box.top - top, box.right - left, box.bottom - top)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return part.resize((view.columns * cell_width, view.rows * cell_height), resample, box=inner)


def dim_dropped(pixels: Image.Image, view: View, kept: Collection[Cell]) -> Image.Image:
    """`pixels` (of :func:`seen_pixels`) with every patch that is not `kept` under a veil; kept pixels are untouched.

    The veil is light over a dark picture and dark over a light one, so that dropped patches do not look like kept ones.
    """
    values = np.asarray(pixels, dtype=np.float32)
    dropped = np.ones((view.rows, view.columns), dtype=bool)
    for row, column in kept:
        dropped[row, column] = False
    height, width = values.shape[0] // view.rows, values.shape[1] // view.columns
    mask = np.kron(dropped, np.ones((height, width), dtype=bool))[..., None]
    veiled = values * SHOWS_THROUGH + veil(pixels) * (1 - SHOWS_THROUGH)
    return Image.fromarray(np.where(mask, veiled, values).round().astype(np.uint8))


def veil(pixels: Image.Image) -> int:
    """The grey that dropped patches of this picture fade into, 0 to 255."""
    return LIGHT_VEIL if float(np.asarray(pixels.convert("L")).mean()) < 128 else DARK_VEIL


def draw_overlay(seen: Sequence[Seen], spans: Sequence[Span], title: str, subtitle: str = "") -> Figure:
    """One row of panels a view, one column a span of layers; `title` (the question) and `subtitle` stand above.

    Args:
        seen: the pictures and views, as :func:`pyramiddrop.report.layout.look` gives them.
        spans: of the same views, as :func:`pyramiddrop.report.spans.spans` gives them.
    """
    pixels = [seen_pixels(one.picture, one.view) for one in seen]
    rows = [[dim_dropped(pixels[row], one.view, span.cells[row]) for span in spans] for row, one in enumerate(seen)]
    heads = [f"{span.layers} · {span.tokens} tokens" for span in spans]
    return draw_panels(seen, heads, rows, title, subtitle)


def draw_panels(
    seen: Sequence[Seen], heads: Sequence[str], rows: Sequence[Sequence[Image.Image]], title: str, subtitle: str = ""
) -> Figure:
    """A figure of `rows` of pixels, one row a view of `seen` and one column a head, under `title` and `subtitle`."""
    heights = [one.view.box.height / one.view.box.width for one in seen]
    panel, head = 2.6, 0.8 if subtitle else 0.6
    figure = Figure(figsize=(panel * len(heads), head + sum(panel * height + 0.1 for height in heights)), dpi=160)
    axes = figure.subplots(len(seen), len(heads), squeeze=False, height_ratios=heights)
    for row, one in enumerate(seen):
        for column in range(len(heads)):
            _panel(axes[row][column], rows[row][column])
        if len(seen) > 1:
            axes[row][0].set_ylabel(one.view.name, fontsize=9, color="#555")
    for axis, text in zip(axes[0], heads, strict=True):
        axis.set_title(text, fontsize=9.5, color="#333", pad=5)
    _line(figure, title, inches_down=0.1, per_inch=9.5, fontsize=13, weight="bold")
    _line(figure, subtitle, inches_down=0.37, per_inch=12.5, fontsize=10, color="#444")
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.03 if len(seen) > 1 else 0.012,
        right=0.988,
        top=1 - head / height,
        bottom=0.1 / height,
        wspace=0.05,
        hspace=0.06,
    )
    return figure


def check_drawn_method(name: str | None) -> None:
    """Raise ValueError where what the named method keeps are no patches of the picture."""
    if name == "downsample":
        raise ValueError("downsample shows the model a smaller picture: its tokens are no patches of this one")


def check_overlay_path(path: Path) -> None:
    """Raise ValueError where no overlay can be written to `path`: no format has its suffix, or it has no folder."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"an overlay must be one of {', '.join(sorted(formats))} by its suffix; got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write the overlay into")


def save_overlay(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`; its suffix chooses the format (png, pdf, svg, ...)."""
    figure.savefig(path, facecolor="white")


def _panel(axis: Axes, pixels: Image.Image) -> None:
    axis.imshow(pixels)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#999")


def _line(figure: Figure, text: str, inches_down: float, per_inch: float, **style: Any) -> None:
    """Write `text` on one line, cut where the figure ends; `per_inch` letters of its size go into an inch."""
    line, limit = " ".join(text.split()), int(figure.get_figwidth() * per_inch)
    shown = line if len(line) <= limit else line[: limit - 1] + "…"
    top = 1 - inches_down / figure.get_figheight()
    figure.text(0.012, top, shown, ha="left", va="top", parse_math=False, **style)  # a price in dollars is no formula
