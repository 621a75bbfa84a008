"""Owns the views of Phi-4-multimodal: tiles put together, without rows and columns of padding, then the whole."""

from __future__ import annotations

import torch
from PIL import Image

from pyramiddrop.report.places.chart import chart
from pyramiddrop.report.places.grid import Box, View, reading_order
from pyramiddrop.report.places.prompt import Prompt


def phi4_views(prompt: Prompt) -> list[list[View]]:
    """`image_attention_mask` tells which patches of each tile are no padding, `image_sizes` the pixels of all tiles.

    A newline token ends each row of both grids, and one token stands between them.
    """
    masks, sizes = prompt.of_pictures("image_attention_mask"), prompt.of_pictures("image_sizes")
    return [_views(prompt, *one) for one in zip(prompt.pictures, masks, sizes, strict=True)]


def _views(prompt: Prompt, picture: Image.Image, masks: list[list[list[int]]], size: list[int]) -> list[View]:
    whole, first, *_ = chart(prompt.config, prompt.processor, picture.size).crops
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
