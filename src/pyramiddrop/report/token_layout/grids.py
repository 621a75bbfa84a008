"""Views of families with grids: LLaVA-NeXT's tiles, grids of the picture's own aspect ratio, and Molmo 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from pyramiddrop.hf.images import unpadded
from pyramiddrop.report.token_layout.geometry import Box, FrameRange, Prompt, Size, View, reading_order

#: LLaVA-OneVision shrinks the grid of its tiles if it exceeds this multiple of so many tiles.
_TOLERANCE = 1.1


def next_views(prompt: Prompt, size: Size) -> list[View]:
    """LLaVA-NeXT: the base view, then the tiles with a newline token in each row."""
    width, height = size
    best = select_best_resolution((height, width), prompt.config.image_grid_pinpoints)
    vision = prompt.config.vision_config
    return tiled_views(width, height, tuple(best), vision.image_size, vision.patch_size)


def onevision_views(prompt: Prompt, size: Size) -> list[View]:
    """LLaVA-OneVision: as LLaVA-NeXT, with large grids of tiles made smaller.

    Each of several pictures is one view, padded to a square, with a newline token after it.
    """
    side = prompt.config.vision_config.image_size // prompt.config.vision_config.patch_size
    if any(count > 1 for count in prompt.inputs.get("batch_num_images", [1])):
        longer = max(size)
        left, top = (-((longer - length) // 2) for length in size)
        cells = (*reading_order(side, side), None)
        return [View("picture", side, side, Box(left, top, left + longer, top + longer), cells)]
    base, tiles = next_views(prompt, size)
    most = int(prompt.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(tiles.rows * tiles.columns / (most * side**2))
    if ratio <= _TOLERANCE:
        return [base, tiles]
    rows, columns = int(tiles.rows // ratio), int(tiles.columns // ratio)
    cells = reading_order(rows, columns, newline=True)
    return [base, replace(tiles, rows=rows, columns=columns, cells=cells, seams=((), ()))]


def tiled_views(width: int, height: int, best: tuple[int, int], tile: int, patch: int) -> list[View]:
    """LLaVA-NeXT: the base features, then the high-resolution grid with a newline token in each row.

    The base view is the whole picture, resized to one square tile. For the grid, the picture is fitted into `best`
    (height, width, multiples of `tile`), centred and padded; the tokens of its tiles are joined to one grid, without
    rows or columns of padding.
    """
    side = tile // patch
    base = View("base", side, side, Box(0, 0, width, height))
    grid = (best[0] // tile * side, best[1] // tile * side)
    top, left, rows, columns = unpadded(*grid, height, width)
    fitted_height, fitted_width = _fitted(height, width, best)
    pad_y, pad_x = (best[0] - fitted_height) // 2, (best[1] - fitted_width) // 2
    scale_y, scale_x = height / fitted_height, width / fitted_width
    box = Box(
        (left * patch - pad_x) * scale_x,
        (top * patch - pad_y) * scale_y,
        ((left + columns) * patch - pad_x) * scale_x,
        ((top + rows) * patch - pad_y) * scale_y,
    )
    seams = _seams(top, rows, side), _seams(left, columns, side)
    return [base, View("tiles", rows, columns, box, reading_order(rows, columns, newline=True), seams)]


def _fitted(height: int, width: int, best: tuple[int, int]) -> tuple[int, int]:
    """The largest size (height, width) with the picture's aspect ratio that fits into `best`."""
    scale_y, scale_x = best[0] / height, best[1] / width
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), best[0]), best[1]
    return best[0], min(math.ceil(width * scale_y), best[1])


def _seams(start: int, count: int, side: int) -> tuple[int, ...]:
    """The indices among `count` rows or columns, from number `start` on, at which another crop of `side` begins."""
    return tuple(place - start for place in range(side, start + count, side) if place > start)


def patch_grid(prompt: Prompt, picture: Image.Image, grid: Sequence[int], newlines: bool = False) -> list[View]:
    """Qwen-VL and relatives: `image_grid_thw` has the patches, squares of which are merged into tokens.

    HunYuan-VL has `newlines`, one after each row, and one token before and after the grid.
    """
    merge = int(prompt.processor.image_processor.merge_size)
    rows, columns = grid[1] // merge, grid[2] // merge
    cells = (*reading_order(rows, columns, leading=1, newline=True), None) if newlines else ()
    return [View("picture", rows, columns, whole(picture), cells)]


def pixel_size(prompt: Prompt, picture: Image.Image, size: Sequence[int]) -> list[View]:
    """Pixtral and relatives: `image_sizes` has the pixels, (height, width); tokens that break rows are text."""
    side = prompt.config.vision_config.patch_size * getattr(prompt.config, "spatial_merge_size", 1)
    return [View("picture", size[0] // side, size[1] // side, whole(picture))]


def patch_grids_in_time(prompt: Prompt) -> list[list[FrameRange]]:
    """Qwen-VL and relatives: `video_grid_thw` has the patches, each of which covers a few consecutive frames."""
    depth, merge = prompt.processor.video_processor.temporal_patch_size, prompt.processor.video_processor.merge_size
    found = []
    for frames, (times, rows, columns) in zip(prompt.videos, prompt.rows("video_grid_thw", "video"), strict=True):
        if math.ceil(len(frames) / depth) != times:
            raise ValueError(f"the processor made {times} times {depth} frames of a video of {len(frames)}")
        view = View("", rows // merge, columns // merge, whole(frames[0]))
        firsts = range(0, len(frames), depth)
        found.append([FrameRange(first, min(first + depth, len(frames)) - 1, view) for first in firsts])
    return found


def placed_patches(prompt: Prompt, picture: Image.Image, places: Sequence[Sequence[int]]) -> list[View]:
    """Gemma 4: `image_position_ids` has the place of each patch, (column, row), with -1 for padding."""
    pooled = prompt.config.model_type == "gemma4"  # other families merge patches before placing them
    side = prompt.config.vision_config.pooling_kernel_size if pooled else 1
    columns, rows = (1 + max(place[axis] for place in places) for axis in (0, 1))
    return [View("picture", rows // side, columns // side, whole(picture))]


def placed_patches_in_time(prompt: Prompt) -> list[list[FrameRange]]:
    """Gemma 4: `video_position_ids` has the same for each frame."""
    places = iter(prompt.rows("video_position_ids", "frame"))
    return [
        [
            FrameRange(number, number, *placed_patches(prompt, frame, next(places)))
            for number, frame in enumerate(frames)
        ]
        for frames in prompt.videos
    ]


def whole(picture: Image.Image) -> Box:
    """The box of the whole picture."""
    return Box(0, 0, picture.width, picture.height)


def molmo_views(prompt: Prompt) -> list[list[View]]:
    """`image_grids` has the rows and columns of both grids, `image_token_pooling` the patches of each token."""
    grids = prompt.rows("image_grids")
    sizes = [rows * columns for grid in grids for rows, columns in (grid[:2], grid[2:])]
    windows = iter(torch.split(torch.as_tensor(prompt.inputs["image_token_pooling"]), sizes))
    return [
        [_view("whole", picture, grid[:2], next(windows)), _view("picture", picture, grid[2:], next(windows))]
        for picture, grid in zip(prompt.pictures, grids, strict=True)
    ]


def molmo_frame_ranges(prompt: Prompt) -> list[list[FrameRange]]:
    """`video_grids` has frames, rows and columns, `video_token_pooling` the patches of each token."""
    grids = prompt.rows("video_grids", "video")
    sizes = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
    windows = iter(torch.split(torch.as_tensor(prompt.inputs["video_token_pooling"]), sizes))
    return [
        [FrameRange(number, number, _view("", frame, grid[1:], next(windows))) for number, frame in enumerate(frames)]
        for frames, grid in zip(prompt.videos, grids, strict=True)
    ]


def _view(name: str, picture: Image.Image, grid: Sequence[int], windows: Tensor) -> View:
    """A view of the whole picture, which incomplete windows (-1) exceed."""
    rows, columns = grid
    side = math.isqrt(windows.shape[-1])
    real = (windows >= 0).reshape(rows, columns, side, side)
    left, right = _ends(real.any(0).any(1).flatten(), picture.width)
    top, bottom = _ends(real.any(1).any(2).flatten(), picture.height)
    return View(name, rows, columns, Box(left, top, right, bottom))


def _ends(real: Tensor, length: int) -> tuple[float, float]:
    """The begin and end of rows or columns of patches, of which the `real` ones cover `length` pixels."""
    patch, before = length / int(real.sum()), int(real.int().argmax())
    return -before * patch, (len(real) - before) * patch
