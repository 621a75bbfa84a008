"""Owns the score heat map: the picture under the colours of the scores that ranked its tokens at one stage end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from PIL import Image

from pyramiddrop.report.grid import View
from pyramiddrop.report.overlay import dim_dropped

#: The colours, dark for low and light for high scores, and how much of them covers the picture.
COLOURS, COVER = "magma", 0.72


def score_range(grids: Sequence[Sequence[Sequence[float]]]) -> Normalize:
    """The colour scale that all views of one stage share: from their lowest finite score to their highest."""
    values = [value for grid in grids for row in grid for value in row if math.isfinite(value)]
    return Normalize(min(values, default=0.0), max(values, default=1.0))


def heat(pixels: Image.Image, view: View, scores: Sequence[Sequence[float]], scale: Normalize) -> Image.Image:
    """`pixels` (of :func:`pyramiddrop.report.overlay.seen_pixels`) under the colours of (rows, columns) `scores`.

    Tokens with NaN were gone before the stage ranked, and are veiled as in an overlay.
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    alive = np.argwhere(~np.isnan(values)).tolist()
    base = np.asarray(dim_dropped(pixels, view, [(row, column) for row, column in alive]), dtype=np.float64)
    colours = matplotlib.colormaps[COLOURS](scale(np.nan_to_num(values)))[..., :3] * 255
    height, width = base.shape[0] // view.rows, base.shape[1] // view.columns
    painted = colours.repeat(height, axis=0).repeat(width, axis=1)
    there = (~np.isnan(values)).repeat(height, axis=0).repeat(width, axis=1)[..., None]
    return Image.fromarray(np.where(there, base * (1 - COVER) + painted * COVER, base).round().astype(np.uint8))
