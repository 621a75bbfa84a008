"""Views of Molmo 2: the whole picture with few tokens, then with many; a token pools a window of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from PIL import Image
from torch import Tensor

from pyramiddrop.report.token_layout.geometry import Box, View
from pyramiddrop.report.token_layout.prompt import FrameRange, Prompt


def molmo_views(prompt: Prompt) -> list[list[View]]:
    """`image_grids` has the rows and columns of both grids, `image_token_pooling` the patches of each token."""
    grids = prompt.of_pictures("image_grids")
    windows = iter(_split(prompt, "image_token_pooling", [each for grid in grids for each in (grid[:2], grid[2:])]))
    return [
        [_view("whole", picture, grid[:2], next(windows)), _view("picture", picture, grid[2:], next(windows))]
        for picture, grid in zip(prompt.pictures, grids, strict=True)
    ]


def molmo_frame_ranges(prompt: Prompt) -> list[list[FrameRange]]:
    """`video_grids` has frames, rows and columns, `video_token_pooling` the patches of each token."""
    grids = prompt.of_videos("video_grids")
    windows = iter(_split(prompt, "video_token_pooling", [grid[1:] for grid in grids for _ in range(grid[0])]))
    return [
        [FrameRange(number, number, _view("", frame, grid[1:], next(windows))) for number, frame in enumerate(frames)]
        for frames, grid in zip(prompt.videos, grids, strict=True)
    ]


def _split(prompt: Prompt, name: str, grids: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    windows, counts = torch.as_tensor(prompt.inputs[name]), [rows * columns for rows, columns in grids]
    return [windows[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]


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
