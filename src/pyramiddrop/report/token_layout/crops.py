"""Views of families with crops: a calibration image shows which part of a picture each crop covers.

Its red grows from left to right, its green from top to bottom, and its blue is constant. The red and green of a crop
tell where it was cut, regardless of resizing, and another blue marks padding. No family's arithmetic of crops is
repeated here, and the processor's settings are followed. Crops that tile the picture are joined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pyramiddrop.inference.prompt import image_token
from pyramiddrop.inference.video import default_metadata
from pyramiddrop.report.token_layout.geometry import (
    Box,
    CannotPlaceError,
    FrameRange,
    Prompt,
    Size,
    View,
    crop_order,
    reading_order,
)

_AS_THEY_ARE: dict[str, Any] = {"return_tensors": "pt", "do_rescale": False, "do_normalize": False}
_FULL = 255
_BLUE, _NEARLY = 200, 3  # a blue that no processor pads with; resampling changes it beside padding
_READING = 2 / _FULL  # precision of positions, as a share of the picture; edges within it count as the picture's own


@dataclass(frozen=True)
class Crop:
    """One input of the vision tower: the part `box` of the picture, as `height` x `width` pixels."""

    box: Box
    height: int
    width: int


@dataclass(frozen=True)
class Calibration:
    """The processor's result for a picture of some size: its crops in order, and the number of visual tokens."""

    crops: list[Crop]
    tokens: int


def calibrate(config: Any, processor: Any, size: tuple[int, int]) -> Calibration:
    """Process a calibration image of `size` (width, height)."""
    made = processor(images=[_calibration_image(*size)], text=[image_token(processor)], **_AS_THEY_ARE)
    return _calibration(config, made, ("pixel_values", "pixel_values_images", "image_pixel_values"), size)


def calibrate_video(config: Any, processor: Any, size: tuple[int, int], frames: int) -> Calibration:
    """Process a video of calibration images; the crops are those of all frames. See :func:`calibrate`."""
    made = processor(
        videos=[[_calibration_image(*size)] * frames],
        text=[processor.video_token],
        video_metadata=[default_metadata(frames)],
        do_sample_frames=False,
        return_metadata=True,
        **_AS_THEY_ARE,
    )
    return _calibration(config, made, ("pixel_values_videos", "pixel_values"), size)


def _calibration(config: Any, made: Any, names: Sequence[str], size: tuple[int, int]) -> Calibration:
    pixels = next(made[name] for name in names if name in made)
    local = made.get("pixel_values_local", [])  # Step 3.7's tiles, whose tokens precede those of the whole picture
    crops = [_crop(crop, size) for crop in [*_crops(local), *_crops(unpatched(made, pixels))] if _blue(crop).any()]
    placeholders = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    parts = (config, getattr(config, "vision_config", None))  # Phi-4-multimodal has it in its vision configuration
    visual = [
        int(getattr(part, name)) for part in parts for name in placeholders if getattr(part, name, None) is not None
    ]
    return Calibration(crops, int(np.isin(made["input_ids"], visual).sum()))


def _calibration_image(width: int, height: int) -> Image.Image:
    values = np.full((height, width, 3), _BLUE, dtype=np.uint8)
    values[:, :, 0] = np.linspace(0, _FULL, width).round()[None]
    values[:, :, 1] = np.linspace(0, _FULL, height).round()[:, None]
    return Image.fromarray(values)


def _crops(pixels: Any) -> list[NDArray[np.float64]]:
    """All (3, H, W) crops in tensors or nested lists."""
    if hasattr(pixels, "shape"):
        flat = torch.as_tensor(pixels).double().numpy()
        return list(flat.reshape(-1, *flat.shape[-3:]))
    return [crop for part in pixels for crop in _crops(part)]


def _crop(pixels: NDArray[np.float64], size: tuple[int, int]) -> Crop:
    _, height, width = pixels.shape
    blue = _blue(pixels)
    left, right = _ends(pixels[0], blue, size[0])
    top, bottom = _ends(pixels[1].T, blue.T, size[1])
    return Crop(Box(left, top, right, bottom), height, width)


def _blue(pixels: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(H, W) bool, True where (3, H, W) shows the picture, not padding."""
    near: NDArray[np.bool_] = np.abs(pixels[2] - _BLUE) <= _NEARLY
    return near


def _ends(values: NDArray[np.float64], blue: NDArray[np.bool_], length: int) -> tuple[float, float]:
    """Begin of the first and end of the last column of `values`, in pixels of a picture that is `length` long."""
    columns = np.flatnonzero(blue.any(0))
    inner = columns[len(columns) // 8 : len(columns) - len(columns) // 8]  # resampling distorts the gradient's ends
    if len(inner) < 2 or length < 2:
        raise CannotPlaceError(
            "cannot place the visual tokens of a crop that shows but one row or column of the picture"
        )
    means = np.array([values[:, column][blue[:, column]].mean() for column in inner])
    places = means / _FULL * (length - 1) + 0.5
    scale, start = np.polyfit(inner + 0.5, places, 1)
    return _snapped(start, length), _snapped(start + scale * values.shape[1], length)


def _snapped(place: float, length: int) -> float:
    edge = 0.0 if place < length / 2 else float(length)
    return edge if abs(place - edge) <= _READING * length else float(place)


def unpatched(made: Any, pixels: Any) -> Any:
    """Rebuild crops (3, H, W) from `pixels` that are patches, as the processor's outputs `made` tell; else `pixels`.

    Kimi's are (patches, 3, side, side). LFM2-VL's are (crops, patches, flat) with the colours last, padded to the
    largest number of patches.
    """
    if "spatial_shapes" in made:
        side = math.isqrt(pixels.shape[-1] // 3)
        patches = pixels.reshape(*pixels.shape[:-1], side, side, 3).movedim(-1, -3)
        shapes = made["spatial_shapes"].tolist()
        return [
            _joined(crop[: rows * columns], rows, columns)
            for crop, (rows, columns) in zip(patches, shapes, strict=True)
        ]
    if "image_grid_thw" in made:
        (_, rows, columns) = made["image_grid_thw"][0].tolist()
        return _joined(pixels, rows, columns)
    return pixels


def _joined(patches: Tensor, rows: int, columns: int) -> Tensor:
    """(rows * columns, 3, side, side) -> (3, H, W)."""
    side = patches.shape[-1]
    grid = patches.reshape(rows, columns, 3, side, side)
    return grid.permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)


#: A crop that lacks less than this share of each side counts as the whole picture.
_SLACK = 0.05


def calibrated_views(prompt: Prompt, size: Size) -> list[View]:
    """The views of a picture whose crops follow each other, with the tokens of each row by row."""
    return crop_views(calibrate(prompt.config, prompt.processor, size), size)


def calibrated_whole_view(prompt: Prompt, size: Size, class_token: bool) -> list[View]:
    """The view of a picture that is one crop of patches, optionally after a class token."""
    (crop,) = calibrate(prompt.config, prompt.processor, size).crops
    patch = prompt.config.vision_config.patch_size
    rows, columns = crop.height // patch, crop.width // patch
    return [View("picture", rows, columns, crop.box, reading_order(rows, columns, leading=int(class_token)))]


def calibrated_frame_ranges(
    prompt: Prompt, frames: Sequence[Image.Image], leading: int, trailing: int
) -> list[FrameRange]:
    """The views of a video with one crop for each frame.

    `leading` tokens without a place stand before each frame, and `trailing` ones after the last frame.
    """
    count = len(frames)
    found = calibrate_video(prompt.config, prompt.processor, frames[0].size, count)
    each, left = divmod(found.tokens - trailing, count)
    if left or len(found.crops) != count:
        raise CannotPlaceError(f"cannot place {found.tokens} visual tokens in {count} frames")
    crop = found.crops[0]
    rows, columns = _grid(crop, each - leading)
    view = View("", rows, columns, crop.box, reading_order(rows, columns, leading))
    last = replace(view, cells=(*view.cells, *[None] * trailing))
    return [FrameRange(number, number, last if number == count - 1 else view) for number in range(count)]


def crop_views(found: Calibration, size: tuple[int, int]) -> list[View]:
    """The crops in their order; those that do not show the whole picture form one view, `tiles`.

    The number of tokens of a crop is proportional to its pixels, and all tiles have one size.
    """
    crops, area = found.crops, sum(crop.height * crop.width for crop in found.crops)
    shares = [divmod(found.tokens * crop.height * crop.width, area) for crop in crops]
    if any(left for _, left in shares):
        raise CannotPlaceError(f"cannot place {found.tokens} visual tokens in {len(crops)} crops")
    if len(crops) == 1:
        return [View("picture", *_grid(crops[0], found.tokens), crops[0].box)]
    views: list[View] = []
    sized = [(crop, tokens) for crop, (tokens, _) in zip(crops, shares, strict=True)]
    for whole, group in groupby(sized, lambda one: _shows_all(one[0].box, size)):
        if whole:
            views += [View("whole", *_grid(crop, tokens), crop.box) for crop, tokens in group]
        else:
            tiles, tokens = zip(*group, strict=True)
            views.append(_together(tiles, tokens[-1]))
    return views


def _shows_all(box: Box, size: tuple[int, int]) -> bool:
    width, height = size
    misses = (box.left / width, box.top / height, 1 - box.right / width, 1 - box.bottom / height)
    return max(misses) < _SLACK


def _together(tiles: Sequence[Crop], tokens: int) -> View:
    """Join crops of `tokens` each that fill a rectangle row by row into one view."""
    first = tiles[0].box
    across = sum(abs(tile.box.top - first.top) < first.height / 2 for tile in tiles)
    down, left = divmod(len(tiles), across)
    if left:
        raise CannotPlaceError(f"cannot place {len(tiles)} crops that are no rows of {across}")
    rows, columns = _grid(tiles[0], tokens)
    box = Box(first.left, first.top, tiles[across - 1].box.right, tiles[-1].box.bottom)
    cells = crop_order((down, across), rows, columns)
    seams = tuple(range(rows, down * rows, rows)), tuple(range(columns, across * columns, columns))
    return View("tiles", down * rows, across * columns, box, cells, seams)


def _grid(crop: Crop, tokens: int) -> tuple[int, int]:
    """Rows and columns of `tokens` whose cells are as square as possible."""
    rows = max(round(math.sqrt(tokens * crop.height / crop.width)), 1)
    if tokens % rows:
        raise CannotPlaceError(f"cannot place {tokens} visual tokens in {crop.height} x {crop.width} pixels")
    return rows, tokens // rows


def phi4_views(prompt: Prompt, picture: Image.Image, masks: list[list[list[int]]], size: list[int]) -> list[View]:
    """Phi-4: `image_attention_mask` has the padding patches of each tile, `image_sizes` the pixels of all tiles.

    A newline token ends each row of both grids, and one token separates them.
    """
    whole, first, *_ = calibrate(prompt.config, prompt.processor, picture.size).crops
    down, across = size[0] // whole.height, size[1] // whole.width
    tiles = torch.tensor(masks)[1 : 1 + down * across, ::2, ::2]  # four patches are one token
    side = tiles.shape[-1]
    kept = tiles.reshape(down, across, side, side).transpose(1, 2).reshape(down * side, across * side)
    rows, columns = int(kept[:, 0].sum()), int(kept[0].sum())
    left, top = first.box.left, first.box.top
    box = Box(left, top, left + columns * first.box.width / side, top + rows * first.box.height / side)
    seams = tuple(range(side, rows, side)), tuple(range(side, columns, side))
    return [
        View("tiles", rows, columns, box, reading_order(rows, columns, newline=True), seams),
        View("whole", side, side, whole.box, reading_order(side, side, leading=1, newline=True)),
    ]
