"""Views of LLaVA-NeXT and its relatives: the whole picture, then its tiles joined, without their padding."""

from __future__ import annotations

import math
from dataclasses import replace

from transformers.image_processing_utils import select_best_resolution

from pyramiddrop.hf.images import unpadded
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.prompt import Prompt, Size

#: LLaVA-OneVision makes its tiles' grid smaller where it has this much more than the tokens of so many tiles on a side.
_TOLERANCE = 1.1


def next_views(prompt: Prompt, size: Size) -> list[View]:
    """LLaVA-NeXT: the base view, then the tiles with one newline token a row."""
    width, height = size
    best = select_best_resolution((height, width), prompt.config.image_grid_pinpoints)
    vision = prompt.config.vision_config
    return tiled_views(width, height, tuple(best), vision.image_size, vision.patch_size)


def onevision_views(prompt: Prompt, size: Size) -> list[View]:
    """LLaVA-OneVision: as LLaVA-NeXT, but the tiles' grid is made smaller where it is large.

    Of several pictures each is one view, padded to a square, with one newline token behind it.
    """
    side = prompt.config.vision_config.image_size // prompt.config.vision_config.patch_size
    if any(count > 1 for count in prompt.inputs.get("batch_num_images", [1])):
        return [_squared(size, side)]
    base, tiles = next_views(prompt, size)
    most = int(prompt.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(tiles.rows * tiles.columns / (most * side**2))
    if ratio <= _TOLERANCE:
        return [base, tiles]
    rows, columns = int(tiles.rows // ratio), int(tiles.columns // ratio)
    cells = reading_order(rows, columns, newline=True)
    return [base, replace(tiles, rows=rows, columns=columns, cells=cells, seams=((), ()))]


def tiled_views(width: int, height: int, best: tuple[int, int], tile: int, patch: int) -> list[View]:
    """LLaVA-NeXT: the order is the base features, then the high-resolution grid with one newline token a row.

    The base view is the whole picture, squeezed into one square tile. For the other one the picture is fitted into
    `best` (height, width, multiples of `tile`), centred and padded; the tokens of its tiles are put together again to
    one grid, and the rows or columns that are nothing but padding are cut off.
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


def _squared(size: Size, side: int) -> View:
    longer = max(size)
    left, top = (-((longer - length) // 2) for length in size)
    cells = (*reading_order(side, side), None)
    return View("picture", side, side, Box(left, top, left + longer, top + longer), cells)


def _fitted(height: int, width: int, best: tuple[int, int]) -> tuple[int, int]:
    """The largest size (height, width) of the picture's own shape that fits into `best`."""
    scale_y, scale_x = best[0] / height, best[1] / width
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), best[0]), best[1]
    return best[0], min(math.ceil(width * scale_y), best[1])


def _seams(start: int, count: int, side: int) -> tuple[int, ...]:
    """Where in `count` rows or columns, the first of which is number `start`, another crop of `side` begins."""
    return tuple(place - start for place in range(side, start + count, side) if place > start)
