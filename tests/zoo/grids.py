"""Images and videos as the processors of Qwen-VL and its kin cut them: rows of flat patches and a grid (t, h, w)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from zoo.pieces import FIRST_TEXT, LAST_TEXT, Inputs, Piece
from zoo.weights import END, IMAGE, START, VIDEO

Grid = tuple[int, int, int]

IMAGE_GRIDS: tuple[Grid, ...] = ((1, 6, 8), (1, 4, 6), (1, 6, 4))  # in patches; four are merged into one token
VIDEO_GRIDS: tuple[Grid, ...] = ((3, 4, 4), (2, 4, 6))


def framed(token: int, kind: int, count: int) -> Piece:
    """So many visual tokens between a start and an end token."""
    return Piece([START] + [token] * count + [END], [0] + [kind] * count + [0], {})


def timestamp(generator: torch.Generator) -> list[int]:
    """Three tokens of text."""
    return torch.randint(FIRST_TEXT, LAST_TEXT, (3,), generator=generator).tolist()


def patches(generator: torch.Generator, grid: Grid, patch: int, pixels: str, thw: str, depth: int = 2) -> Inputs:
    """Random patches, each flat over its colours, `depth` frames and pixels, and their grid; under these names."""
    flat = 3 * depth * patch * patch
    count = grid[0] * grid[1] * grid[2]
    return {pixels: torch.randn(count, flat, generator=generator), thw: torch.tensor([grid])}


def image(model: PreTrainedModel, generator: torch.Generator, number: int, patch: int, depth: int = 2) -> Piece:
    """An image between start and end tokens."""
    grid = IMAGE_GRIDS[number % len(IMAGE_GRIDS)]
    piece = framed(IMAGE, 1, grid[1] * grid[2] // 4)
    piece.tensors = patches(generator, grid, patch, "pixel_values", "image_grid_thw", depth)
    return piece


def video(model: PreTrainedModel, generator: torch.Generator, number: int, patch: int, depth: int = 2) -> Piece:
    """A video between one start and one end token."""
    grid = VIDEO_GRIDS[number % len(VIDEO_GRIDS)]
    piece = framed(VIDEO, 2, grid[0] * grid[1] * grid[2] // 4)
    piece.tensors = patches(generator, grid, patch, "pixel_values_videos", "video_grid_thw", depth)
    return piece.cut([grid[1] * grid[2] // 4] * grid[0])


def frames_video(model: PreTrainedModel, generator: torch.Generator, number: int, patch: int, depth: int = 2) -> Piece:
    """A video whose frames stand one by one, each behind its timestamp and between start and end."""
    grid = VIDEO_GRIDS[number % len(VIDEO_GRIDS)]
    piece = Piece([], [], {})
    for _ in range(grid[0]):
        frame = framed(VIDEO, 2, grid[1] * grid[2] // 4)
        piece.ids += timestamp(generator) + frame.ids
        piece.types += [0, 0, 0, *frame.types]
    piece.tensors = patches(generator, grid, patch, "pixel_values_videos", "video_grid_thw", depth)
    return piece.cut([grid[1] * grid[2] // 4] * grid[0])
