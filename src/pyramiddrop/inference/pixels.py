"""Convert a picture of any mode to RGB without clipping values of more than 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pyramiddrop.inference.errors import InputError

#: Formats in which Pillow's mode "I" holds values from 0 to 65535.
SIXTEEN_BITS = ("PNG", "PPM")


def to_rgb(picture: Image.Image) -> Image.Image:
    """A copy of `picture` in RGB, without transparency, as in Transformers' processors.

    Pillow alone clips values above 255 to white. Here 16-bit values are scaled from 0..65535, and floats from 0..1.

    Raises:
        InputError: for 32-bit integers and floats outside 0..1, whose range is unknown, and for modes that Pillow
            cannot convert.
    """
    largest = _largest(picture)
    if largest is not None:
        values = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((values * (255 / largest)).round().astype(np.uint8))
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise InputError(f"mode {picture.mode} cannot be converted to RGB; save it as an RGB picture") from error


def _largest(picture: Image.Image) -> float | None:
    """The value of white, or None if Pillow knows it."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format in SIXTEEN_BITS):
        return 65535
    if mode not in ("I", "F"):
        return None
    values = np.asarray(picture)
    lowest, highest = values.min(), values.max()
    if mode == "F" and 0 <= lowest <= highest <= 1:
        return 1
    raise InputError(
        f"mode {mode} with values from {lowest:g} to {highest:g} has no known range; save it with 8 or 16 bits, or as "
        "floats from 0 to 1"
    )
