"""The pixels of a view of the picture, under a mask on dropped tokens or under the colours of their scores."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image

from pyramiddrop.inference.prompt import to_rgb
from pyramiddrop.report.token_layout.geometry import Cell, View, values_by_view

#: Share of a dropped patch's own colour that shows through the overlay.
SHOWS_THROUGH = 0.14
LIGHT_OVERLAY, DARK_OVERLAY = 232, 24
#: Opacity of the line between two crops.
SEAM = 0.6


def seen_pixels(picture: Image.Image, view: View, long_side: int = 448) -> Image.Image:
    """The part of `picture` that `view` covers, scaled so that every patch has the same whole number of pixels.

    The longer side has about `long_side` pixels. Parts outside the picture are black, like a model's padding.
    """
    box = view.box
    scale = long_side / max(box.width, box.height)
    cell_width = max(1, round(box.width * scale / view.columns))
    cell_height = max(1, round(box.height * scale / view.rows))
    left, top = math.floor(box.left), math.floor(box.top)
    part = to_rgb(picture).crop((left, top, math.ceil(box.right), math.ceil(box.bottom)))
    inner = (box.left - left, box.top - top, box.right - left, box.bottom - top)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return part.resize((view.columns * cell_width, view.rows * cell_height), resample, box=inner)


def patch_pixels(pixels: Image.Image, view: View) -> tuple[int, int]:
    """Height and width of a patch in `pixels` (from :func:`seen_pixels`)."""
    return pixels.height // view.rows, pixels.width // view.columns


def mask_dropped(pixels: Image.Image, view: View, kept: Collection[Cell]) -> Image.Image:
    """Cover the places of tokens that are not `kept` in `pixels` (from :func:`seen_pixels`) with an overlay.

    Kept pixels are unchanged. The overlay is light on a dark picture and dark on a light one, so that dropped patches
    do not look like kept ones.
    """
    values = np.asarray(pixels, dtype=np.float32)
    dropped = np.zeros((view.rows, view.columns), dtype=bool)
    for row, column in view.places.difference(kept):
        dropped[row, column] = True
    height, width = patch_pixels(pixels, view)
    mask = np.kron(dropped, np.ones((height, width), dtype=bool))[..., None]
    veiled = values * SHOWS_THROUGH + overlay_grey(pixels) * (1 - SHOWS_THROUGH)
    return Image.fromarray(np.where(mask, veiled, values).round().astype(np.uint8))


def overlay_grey(pixels: Image.Image) -> int:
    """The grey value of the overlay on this picture, 0 to 255."""
    return LIGHT_OVERLAY if float(np.asarray(pixels.convert("L")).mean()) < 128 else DARK_OVERLAY


def with_seams(pixels: Image.Image, view: View) -> Image.Image:
    """Draw lines between the crops of the picture on `pixels`."""
    values = np.array(pixels, dtype=np.float32)
    height, width = patch_pixels(pixels, view)
    rows, columns = view.seams
    line = np.zeros(values.shape[:2], dtype=bool)
    line[[row * height for row in rows]] = True
    line[:, [column * width for column in columns]] = True
    values[line] = values[line] * (1 - SEAM) + (255 - overlay_grey(pixels)) * SEAM
    return Image.fromarray(values.round().astype(np.uint8))


def picture_data(pixels: Image.Image) -> str:
    """`pixels` as a `data:` URL: PNG, or JPEG if that is smaller (for photographs)."""
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90, "subsampling": 0})):
        buffer = io.BytesIO()
        pixels.save(buffer, kind, **options)
        files[kind] = buffer.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64," + base64.b64encode(files[kind]).decode()


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
    alive = ~np.isnan(values)
    kept = {(row, column) for row, column in np.argwhere(alive).tolist()}
    base = np.asarray(mask_dropped(pixels, view, kept), dtype=np.float64)
    colours = matplotlib.colormaps[COLOURS](1 - (np.nan_to_num(values, nan=1.0) - 1) / max(1, tokens - 1))
    height, width = patch_pixels(pixels, view)
    painted = 255 * colours[..., :3].repeat(height, axis=0).repeat(width, axis=1)
    there = alive.repeat(height, axis=0).repeat(width, axis=1)[..., None]
    return Image.fromarray(np.where(there, base * (1 - COVER) + painted * COVER, base).round().astype(np.uint8))


def ramp(steps: int = 32) -> list[str]:
    """The colours from the lowest rank to the highest, as `#rrggbb`."""
    return [to_hex(matplotlib.colormaps[COLOURS](place / (steps - 1))) for place in range(steps)]
