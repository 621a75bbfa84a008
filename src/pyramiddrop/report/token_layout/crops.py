"""Views of families with crops of one size; crops that tile the picture are joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from pyramiddrop.report.token_layout.calibration import Calibration, Crop, calibrate, calibrate_video
from pyramiddrop.report.token_layout.geometry import Box, View, crop_order, reading_order
from pyramiddrop.report.token_layout.prompt import CannotPlaceError, FrameRange, Prompt, Size

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

    Args:
        leading: number of tokens without a place before each frame.
        trailing: number of tokens without a place after the last frame.

    Raises:
        CannotPlaceError: if tokens and frames do not match.
    """
    count = len(frames)
    found = calibrate_video(prompt.config, prompt.processor, frames[0].size, count)
    each, left = divmod(found.tokens - trailing, count)
    if left or len(found.crops) != count:
        raise CannotPlaceError(f"cannot place {found.tokens} visual tokens in {count} frames")
    crop = found.crops[0]
    rows, columns = _grid(crop, each - leading)
    cells = reading_order(rows, columns, leading)
    view = View("", rows, columns, crop.box, cells)
    last = replace(view, cells=(*cells, *[None] * trailing))
    return [FrameRange(number, number, last if number == count - 1 else view) for number in range(count)]


def crop_views(found: Calibration, size: tuple[int, int]) -> list[View]:
    """The crops in their order; those that do not show the whole picture form one view, `tiles`.

    The number of tokens of a crop is proportional to its pixels, and all tiles have one size.

    Raises:
        CannotPlaceError: if tokens and crops do not match.
    """
    crops, area = found.crops, sum(crop.height * crop.width for crop in found.crops)
    shares = [divmod(found.tokens * crop.height * crop.width, area) for crop in crops]
    if any(left for _, left in shares):
        raise CannotPlaceError(f"cannot place {found.tokens} visual tokens in {len(crops)} crops")
    if len(crops) == 1:
        return [replace(_alone(crops[0], found.tokens), name="picture")]
    views: list[View] = []
    tiles: list[Crop] = []
    each = 0
    for crop, (tokens, _) in zip(crops, shares, strict=True):
        if not _shows_all(crop.box, size):
            tiles.append(crop)
            each = tokens
            continue
        views += _together(tiles, each)
        views.append(_alone(crop, tokens))
        tiles = []
    return views + _together(tiles, each)


def _shows_all(box: Box, size: tuple[int, int]) -> bool:
    width, height = size
    misses = (box.left / width, box.top / height, 1 - box.right / width, 1 - box.bottom / height)
    return max(misses) < _SLACK


def _alone(crop: Crop, tokens: int) -> View:
    rows, columns = _grid(crop, tokens)
    return View("whole", rows, columns, crop.box)


def _together(tiles: Sequence[Crop], tokens: int) -> list[View]:
    """Join crops that fill a rectangle row by row into one view."""
    if not tiles:
        return []
    first = tiles[0].box
    across = sum(abs(tile.box.top - first.top) < first.height / 2 for tile in tiles)
    down, left = divmod(len(tiles), across)
    if left:
        raise CannotPlaceError(f"cannot place {len(tiles)} crops that are no rows of {across}")
    rows, columns = _grid(tiles[0], tokens)
    box = Box(first.left, first.top, tiles[across - 1].box.right, tiles[-1].box.bottom)
    cells = crop_order((down, across), rows, columns)
    seams = tuple(range(rows, down * rows, rows)), tuple(range(columns, across * columns, columns))
    return [View("tiles", down * rows, across * columns, box, cells, seams)]


def _grid(crop: Crop, tokens: int) -> tuple[int, int]:
    """Rows and columns of `tokens` whose cells are as square as possible."""
    rows = max(round(math.sqrt(tokens * crop.height / crop.width)), 1)
    if tokens % rows:
        raise CannotPlaceError(f"cannot place {tokens} visual tokens in {crop.height} x {crop.width} pixels")
    return rows, tokens // rows


def phi4_views(prompt: Prompt) -> list[list[View]]:
    """Phi-4: `image_attention_mask` has the padding patches of each tile, `image_sizes` the pixels of all tiles.

    A newline token ends each row of both grids, and one token separates them.
    """
    masks, sizes = prompt.of_pictures("image_attention_mask"), prompt.of_pictures("image_sizes")
    return [_phi4_views(prompt, *one) for one in zip(prompt.pictures, masks, sizes, strict=True)]


def _phi4_views(prompt: Prompt, picture: Image.Image, masks: list[list[list[int]]], size: list[int]) -> list[View]:
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
