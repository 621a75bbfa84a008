"""Owns the way back from patches to pixels, for processors that cut their crops up themselves."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def unpatched(made: Any, pixels: Any) -> Any:
    """Crops as (3, H, W), where a processor's outputs `made` tell that its `pixels` are patches; else those.

    Kimi's are (patches, 3, side, side). LFM2-VL's are (crops, patches, flat) with the colours last, padded to the most
    patches of any crop.
    """
    if "spatial_shapes" in made:
        return [
            _crop(_squares(crop[: rows * columns]), rows, columns)
            for crop, (rows, columns) in zip(pixels, made["spatial_shapes"].tolist(), strict=True)
        ]
    if "image_grid_thw" in made:
        (_, rows, columns) = made["image_grid_thw"][0].tolist()
        return _crop(pixels, rows, columns)
    return pixels


def _squares(flat: Tensor) -> Tensor:
    side = math.isqrt(flat.shape[-1] // 3)
    return flat.reshape(-1, side, side, 3).movedim(-1, 1)


def _crop(patches: Tensor, rows: int, columns: int) -> Tensor:
    """(rows * columns, 3, side, side) -> (3, H, W)."""
    side = patches.shape[-1]
    grid = patches.reshape(rows, columns, 3, side, side)
    return grid.permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)
