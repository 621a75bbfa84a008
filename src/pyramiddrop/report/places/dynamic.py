"""Owns the views of families that keep a picture's shape: it is stretched to a whole number of patches."""

from __future__ import annotations

from PIL import Image

from pyramiddrop.report.grid import Box, View, reading_order
from pyramiddrop.report.places.prompt import Prompt


def patch_grids(prompt: Prompt) -> list[list[View]]:
    """Qwen-VL and its kin: `image_grid_thw` tells the patches, a square of which is one token."""
    merge = merge_size(prompt)
    return [
        [View("picture", rows // merge, columns // merge, whole(picture))]
        for picture, (_, rows, columns) in zip(prompt.pictures, prompt.told("image_grid_thw"), strict=True)
    ]


def newline_grids(prompt: Prompt) -> list[list[View]]:
    """HunYuan-VL: `image_grid_thw`, too; a newline ends each row, one token stands before the grid and one behind."""
    merge, found = merge_size(prompt), []
    for picture, (_, rows, columns) in zip(prompt.pictures, prompt.told("image_grid_thw"), strict=True):
        down, across = rows // merge, columns // merge
        cells = (*reading_order(down, across, leading=1, newline=True), None)
        found.append([View("picture", down, across, whole(picture), cells)])
    return found


def pixel_sizes(prompt: Prompt) -> list[list[View]]:
    """Pixtral and its kin: `image_sizes` tells the pixels, (height, width); tokens that break the rows are text."""
    side = prompt.config.vision_config.patch_size * getattr(prompt.config, "spatial_merge_size", 1)
    return [
        [View("picture", height // side, width // side, whole(picture))]
        for picture, (height, width) in zip(prompt.pictures, prompt.told("image_sizes"), strict=True)
    ]


def merge_size(prompt: Prompt) -> int:
    """How many patches, down and across, are one token."""
    return int(prompt.processor.image_processor.merge_size)


def whole(picture: Image.Image) -> Box:
    """All of a picture."""
    return Box(0, 0, picture.width, picture.height)
