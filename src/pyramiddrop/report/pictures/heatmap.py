"""Score heatmaps: the picture under the colours of the scores that ranked its tokens at one drop."""

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

#: The colours, dark for low and light for high scores, and how much of them covers the picture.
COLOURS, COVER = "magma", 0.72

Grid = list[list[float]]


@dataclass(frozen=True)
class Scored:
    """The scores of one drop, before `layer`: (N,) `values` in the order of the prompt, NaN where one was gone.

    A few tokens get almost all attention, so colours go with the rank: half of the tokens are darker than the middle.
    """

    layer: int
    views: Sequence[View]
    values: torch.Tensor

    @cached_property
    def scores(self) -> list[Grid]:
        """For each view its rows of scores, NaN where a token was gone."""
        return values_by_view(self.views, self.values.tolist())

    @cached_property
    def ranks(self) -> list[Grid]:
        """For each view its rows of ranks among all tokens that were there, 1 for the highest score."""
        order = self._sorted
        ranks = len(order) - torch.searchsorted(order, self.values.double(), right=True) + 1
        return values_by_view(self.views, torch.where(self.values.isnan(), torch.nan, ranks.double()).tolist())

    @property
    def tokens(self) -> int:
        """How many tokens were ranked, those without a place in the picture among them."""
        return len(self._sorted)

    def at(self, shares: Sequence[float]) -> list[float]:
        """The scores below which these shares of the tokens lie: 0 for the lowest score, 1 for the highest."""
        return [float(self._sorted[round(share * (self.tokens - 1))]) for share in shares]

    @cached_property
    def _sorted(self) -> torch.Tensor:
        return self.values[~self.values.isnan()].double().sort().values


def draw_heatmap(pixels: Image.Image, view: View, ranks: Sequence[Sequence[float]], tokens: int) -> Image.Image:
    """`pixels` (of `overlay.seen_pixels`) under the colours of (rows, columns) `ranks`.

    Tokens with NaN were gone before the stage ranked, and are veiled as in a picture of what was kept.
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
