"""Score heatmaps: the picture under colours of the scores that ranked its tokens at a drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image

from pyramiddrop.report.pictures.overlay import mask_dropped, patch_pixels
from pyramiddrop.report.token_layout.geometry import View, values_by_view

#: The colour map, dark for low and light for high scores, and its opacity over the picture.
COLOURS, COVER = "magma", 0.72

Grid = list[list[float]]


@dataclass(frozen=True)
class Scored:
    """The scores of the drop before `layer`: (N,) `values` in the order of the prompt, NaN at tokens dropped before.

    A few tokens receive almost all attention, so that colours show ranks instead of values.
    """

    layer: int
    views: Sequence[View]
    values: torch.Tensor

    @cached_property
    def scores(self) -> list[Grid]:
        """For each view its rows of scores, NaN at tokens dropped before."""
        return values_by_view(self.views, self.values.tolist())

    @cached_property
    def ranks(self) -> list[Grid]:
        """For each view its rows of ranks among all ranked tokens, 1 for the highest score."""
        order = self._sorted
        ranks = len(order) - torch.searchsorted(order, self.values.double(), right=True) + 1
        return values_by_view(self.views, torch.where(self.values.isnan(), torch.nan, ranks.double()).tolist())

    @property
    def tokens(self) -> int:
        """The number of ranked tokens, including those without a place in the picture."""
        return len(self._sorted)

    def at(self, shares: Sequence[float]) -> list[float]:
        """The quantiles of the scores: 0 gives the lowest score, 1 the highest."""
        return [float(self._sorted[round(share * (self.tokens - 1))]) for share in shares]

    @cached_property
    def _sorted(self) -> torch.Tensor:
        return self.values[~self.values.isnan()].double().sort().values


def draw_heatmap(pixels: Image.Image, view: View, ranks: Sequence[Sequence[float]], tokens: int) -> Image.Image:
    """Colour `pixels` (from `overlay.seen_pixels`) by (rows, columns) `ranks`.

    Tokens with NaN were dropped before, and are masked as in a picture of kept tokens.
    """
    values: NDArray[np.float64] = np.asarray(ranks, dtype=np.float64)
    alive = np.argwhere(~np.isnan(values)).tolist()
    base = np.asarray(mask_dropped(pixels, view, [(row, column) for row, column in alive]), dtype=np.float64)
    colours = matplotlib.colormaps[COLOURS](1 - (np.nan_to_num(values, nan=1.0) - 1) / max(1, tokens - 1))
    height, width = patch_pixels(pixels, view)
    painted = 255 * colours[..., :3].repeat(height, axis=0).repeat(width, axis=1)
    there = (~np.isnan(values)).repeat(height, axis=0).repeat(width, axis=1)[..., None]
    return Image.fromarray(np.where(there, base * (1 - COVER) + painted * COVER, base).round().astype(np.uint8))


def ramp(steps: int = 32) -> list[str]:
    """The colours from the lowest rank to the highest, as `#rrggbb`."""
    return [to_hex(matplotlib.colormaps[COLOURS](place / (steps - 1))) for place in range(steps)]
