"""Views of families that keep a picture's aspect ratio: it is resized to a whole number of patches."""

from __future__ import annotations

import math

from PIL import Image

from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.prompt import Moment, Prompt


def patch_grids(prompt: Prompt) -> list[list[View]]:
    """Qwen-VL and its kin: `image_grid_thw` tells the patches, a square of which is one token."""
    merge = merge_size(prompt)
    return [
        [View("picture", rows // merge, columns // merge, whole(picture))]
        for picture, (_, rows, columns) in zip(prompt.pictures, prompt.of_pictures("image_grid_thw"), strict=True)
    ]


def newline_grids(prompt: Prompt) -> list[list[View]]:
    """HunYuan-VL: `image_grid_thw`, too; a newline ends each row, one token stands before the grid and one behind."""
    merge, found = merge_size(prompt), []
    for picture, (_, rows, columns) in zip(prompt.pictures, prompt.of_pictures("image_grid_thw"), strict=True):
        down, across = rows // merge, columns // merge
        cells = (*reading_order(down, across, leading=1, newline=True), None)
        found.append([View("picture", down, across, whole(picture), cells)])
    return found


def pixel_sizes(prompt: Prompt) -> list[list[View]]:
    """Pixtral and its kin: `image_sizes` tells the pixels, (height, width); tokens that break the rows are text."""
    side = prompt.config.vision_config.patch_size * getattr(prompt.config, "spatial_merge_size", 1)
    return [
        [View("picture", height // side, width // side, whole(picture))]
        for picture, (height, width) in zip(prompt.pictures, prompt.of_pictures("image_sizes"), strict=True)
    ]


def patch_grids_in_time(prompt: Prompt) -> list[list[Moment]]:
    """Qwen-VL and its kin: `video_grid_thw` tells the patches, each of which covers a few frames, one after another.

    Raises:
        ValueError: where the processor took other frames than those of the prompt.
    """
    depth, merge = prompt.processor.video_processor.temporal_patch_size, prompt.processor.video_processor.merge_size
    found = []
    for frames, (times, rows, columns) in zip(prompt.videos, prompt.of_videos("video_grid_thw"), strict=True):
        if math.ceil(len(frames) / depth) != times:
            raise ValueError(f"the processor made {times} times {depth} frames of a video of {len(frames)}")
        view = View("", rows // merge, columns // merge, whole(frames[0]))
        firsts = range(0, len(frames), depth)
        found.append([Moment(first, min(first + depth, len(frames)) - 1, view) for first in firsts])
    return found


def placed_patches(prompt: Prompt) -> list[list[View]]:
    """Gemma 4: `image_position_ids` tells the place of each patch, (column, row), and -1 for padding."""
    return [
        [_placed(prompt, picture, places)]
        for picture, places in zip(prompt.pictures, prompt.of_pictures("image_position_ids"), strict=True)
    ]


def placed_patches_in_time(prompt: Prompt) -> list[list[Moment]]:
    """The same of each frame: `video_position_ids`."""
    places = iter(prompt.of_frames("video_position_ids"))
    return [
        [Moment(number, number, _placed(prompt, frame, next(places))) for number, frame in enumerate(frames)]
        for frames in prompt.videos
    ]


def _placed(prompt: Prompt, picture: Image.Image, places: list[tuple[int, int]]) -> View:
    pooled = prompt.config.model_type == "gemma4"  # the other ones' patches are merged before they are placed
    side = prompt.config.vision_config.pooling_kernel_size if pooled else 1
    columns, rows = (1 + max(place[axis] for place in places) for axis in (0, 1))
    return View("picture", rows // side, columns // side, whole(picture))


def merge_size(prompt: Prompt) -> int:
    """How many patches, down and across, are one token."""
    return int(prompt.processor.image_processor.merge_size)


def whole(picture: Image.Image) -> Box:
    """All of a picture."""
    return Box(0, 0, picture.width, picture.height)
