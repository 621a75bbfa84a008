"""The pixels of a view of the picture, and the overlay mask on the places of dropped tokens."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection

import numpy as np
from PIL import Image

from pyramiddrop.inference.pixels import to_rgb
from pyramiddrop.report.token_layout.geometry import Cell, View

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
    files = {kind: _encoded(pixels, kind) for kind in ("png", "jpeg")}
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64," + base64.b64encode(files[kind]).decode()


def _encoded(pixels: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "png" else {"quality": 90, "subsampling": 0}
    pixels.save(buffer, kind, **options)
    return buffer.getvalue()
