"""Where visual tokens lie in a picture: numbers worked out by hand, and Transformers' own packing as the judge."""

from __future__ import annotations

import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

from pyramiddrop.hf.images import unpadded
from pyramiddrop.report.token_layout.geometry import Box, View, cells_by_view, crop_order, reading_order
from pyramiddrop.report.token_layout.grids import tiled_views
from tiny import tiny_model

PATCH, TILE = 7, 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


def test_tokens_in_reading_order_with_a_newline_after_each_row() -> None:
    view = View("tiles", rows=2, columns=3, box=Box(0, 0, 3, 2), cells=reading_order(2, 3, newline=True))
    assert view.tokens == 8
    assert [view.cell(token) for token in range(8)] == [(0, 0), (0, 1), (0, 2), None, (1, 0), (1, 1), (1, 2), None]


def test_a_class_token_stands_before_the_grid() -> None:
    view = View("picture", rows=2, columns=2, box=Box(0, 0, 2, 2), cells=reading_order(2, 2, leading=1))
    assert [view.cell(token) for token in range(5)] == [None, (0, 0), (0, 1), (1, 0), (1, 1)]


def test_crops_come_one_after_another() -> None:
    # 1 x 2 crops of 2 x 2 tokens: the left one whole, then the right one
    assert crop_order((1, 2), 2, 2) == ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    assert crop_order((2, 1), 1, 2) == ((0, 0), (0, 1), (1, 0), (1, 1))


@pytest.mark.parametrize("token", [-1, 4])
def test_a_token_beyond_the_view_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=r"token must be in 0\.\.3"):
        View("picture", 2, 2, Box(0, 0, 2, 2)).cell(token)


def test_tokens_are_numbered_through_the_views() -> None:
    base = View("base", 1, 2, Box(0, 0, 2, 1))
    tiles = View("tiles", 1, 3, Box(0, 0, 3, 1), reading_order(1, 3, newline=True))
    assert cells_by_view([base, tiles], [1, 2, 4, 5]) == [{(0, 1)}, {(0, 0), (0, 2)}]
    with pytest.raises(ValueError, match="token 6 is beyond the 6 visual tokens"):
        cells_by_view([base, tiles], [6])


def test_tiles_of_a_wide_picture() -> None:
    # 672 x 672 are 2 x 2 tiles of 336, 48 x 48 patches; 900 x 500 fits as 672 x 374 with 149 pixels of padding above.
    # 48 * 500 / 900 = 26.67 rows are needed; half of the 22 others are cut off at each side: 11 rows or 154 pixels.
    base, tiles = tiled_views(900, 500, (672, 672), 336, 14)
    assert (base.rows, base.columns, base.tokens, base.box) == (24, 24, 576, Box(0, 0, 900, 500))
    assert (tiles.rows, tiles.columns) == (26, 48)
    assert tiles.tokens == 26 * 49
    assert tiles.seams == ((13,), (24,))  # 24 - 11 rows are the upper tiles'
    assert tiles.box.left == 0
    assert tiles.box.right == pytest.approx(900)
    assert tiles.box.top == pytest.approx((154 - 149) * 500 / 374)


def test_padding_that_is_left_sticks_out_of_the_picture() -> None:
    # 50 x 80 fits into 56 x 56 as 35 x 56, 10 pixels from the left; of 8 columns 5 are needed and 6 stay, from 7 pixels
    assert unpadded(8, 8, 80, 50) == (0, 1, 8, 6)
    _, tiles = tiled_views(50, 80, (56, 56), 28, 7)
    assert tiles.box.left == pytest.approx(-3 * 50 / 35)
    assert (tiles.box.top, tiles.box.bottom) == (0, 80)


@pytest.mark.parametrize(
    "size", [(90, 60), (60, 90), (50, 80), (28, 28), (200, 31), (31, 200), (57, 56), (99, 33), (1, 1)]
)
def test_the_order_is_that_of_transformers(size: tuple[int, int]) -> None:
    width, height = size
    model = tiny_model("next").model
    model.config.image_grid_pinpoints = PINPOINTS
    best = select_best_resolution((height, width), PINPOINTS)
    rows, columns = best[0] // TILE, best[1] // TILE
    newline = torch.full((3,), -1.0)
    packed, _ = model.pack_image_features(
        [_numbered_features(rows, columns)],
        torch.tensor([[height, width]]),
        "default",
        image_newline=newline,
    )
    base, tiles = tiled_views(width, height, best, TILE, PATCH)
    top, left, *_ = unpadded(rows * 4, columns * 4, height, width)
    expected = [_place(0, base.cell(token), 0, 0) for token in range(base.tokens)]
    expected += [_place(1, tiles.cell(token), top, left) for token in range(tiles.tokens)]
    assert packed[0].int().tolist() == expected


def _place(view: int, cell: tuple[int, int] | None, top: int, left: int) -> list[int]:
    """What the feature at `cell` says where it is from; a newline says -1."""
    return [-1, -1, -1] if cell is None else [view, cell[0] + top, cell[1] + left]


def _numbered_features(rows: int, columns: int) -> torch.Tensor:
    """Features that say where they are from: view, row and column in the grid of all tiles; (1 + tiles, 16, 3)."""
    side = TILE // PATCH
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    crops = [torch.stack([torch.zeros_like(row), row, column], dim=-1)]
    for down in range(rows):
        for right in range(columns):
            crops.append(torch.stack([torch.ones_like(row), row + down * side, column + right * side], dim=-1))
    return torch.stack(crops).reshape(len(crops), side * side, 3).float()
