"""Which part of a picture each crop shows, read off a ruled picture: held against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyramiddrop.inference.checkpoint import load_processor, read_config
from pyramiddrop.report.token_layout.crops import Calibration, Crop, calibrate, crop_views
from pyramiddrop.report.token_layout.geometry import Box, CannotPlaceError
from tiny import CROP

CONFIG = SimpleNamespace(image_token_id=9)


def processor(*crops: Any) -> Any:
    """Makes each crop by a function of a (3, H, W) picture, and two visual tokens a crop."""

    def call(images: list[Image.Image], **settings: Any) -> dict[str, Any]:
        assert settings == {"text": ["<image>"], "return_tensors": "pt", "do_rescale": False, "do_normalize": False}
        pixels = np.moveaxis(np.asarray(images[0]).astype(float), -1, 0)
        return {"pixel_values": [crop(pixels) for crop in crops], "input_ids": [[1, *[9, 9] * len(crops)]]}

    return call


def padded(pixels: Any, left: int, top: int, right: int, bottom: int, colour: int = 0) -> Any:
    return np.pad(pixels, ((0, 0), (top, bottom), (left, right)), constant_values=colour)


def assert_near(box: Box, left: float, top: float, right: float, bottom: float, within: float = 0.3) -> None:
    assert (box.left, box.top, box.right, box.bottom) == pytest.approx((left, top, right, bottom), abs=within)


def test_parts_of_the_picture_are_read_where_they_were_cut() -> None:
    found = calibrate(CONFIG, processor(lambda whole: whole, lambda whole: whole[:, 10:40, 60:90]), (100, 50))
    assert found.tokens == 4
    assert found.crops[0] == Crop(Box(0, 0, 100, 50), 50, 100)
    assert (found.crops[1].height, found.crops[1].width) == (30, 30)
    assert_near(found.crops[1].box, 60, 10, 90, 40)


def test_padding_sticks_out_of_the_picture_whatever_its_colour() -> None:
    for colour in (0, 127, 255):
        found = calibrate(
            CONFIG, processor(lambda whole, colour=colour: padded(whole, 20, 5, 30, 0, colour)), (100, 50)
        )
        assert_near(found.crops[0].box, -20, -5, 130, 50)


def test_a_shrunk_picture_is_read_in_its_own_pixels() -> None:
    found = calibrate(CONFIG, processor(lambda whole: whole.reshape(3, 25, 4, 50, 8).mean((2, 4))), (400, 100))
    assert found.crops == [Crop(Box(0, 0, 400, 100), 25, 50)]


def test_crops_that_are_padding_alone_are_none() -> None:
    found = calibrate(CONFIG, processor(lambda whole: whole, np.zeros_like), (100, 50))
    assert len(found.crops) == 1


@pytest.mark.parametrize("size", [(1, 50), (50, 1)])
def test_a_picture_without_width_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(CannotPlaceError, match="a crop that shows but one row or column"):
        calibrate(CONFIG, processor(lambda whole: whole), size)


def test_the_processor_of_llava_cuts_the_middle(llava_folder: Path) -> None:
    # 100 x 60 pixels, shorter edge to CROP; the middle of the longer one is cut: 20..80 of the original
    found = calibrate(read_config(llava_folder), load_processor(llava_folder), (100, 60))
    (crop,) = found.crops
    assert (found.tokens, crop.height, crop.width) == (16, CROP, CROP)
    assert_near(crop.box, 20, 0, 80, 60, within=1.5)


def tile(left: float, top: float, right: float, bottom: float) -> Crop:
    return Crop(Box(left, top, right, bottom), 8, 8)


WHOLE = tile(0, 0, 30, 20)
TILES = [tile(0, 0, 10, 10), tile(10, 0, 20, 10), tile(20, 0, 30, 10)]
TILES += [tile(0, 10, 10, 20), tile(10, 10, 20, 20), tile(20, 10, 30, 20)]


@pytest.mark.parametrize("last", [False, True])
def test_tiles_are_put_together_and_the_whole_stands_before_or_behind_them(last: bool) -> None:
    crops = [*TILES, WHOLE] if last else [WHOLE, *TILES]
    views = crop_views(Calibration(crops, 28), (30, 20))
    assert [view.name for view in views] == (["tiles", "whole"] if last else ["whole", "tiles"])
    tiles, whole = (views[0], views[1]) if last else (views[1], views[0])
    assert (whole.rows, whole.columns, whole.box) == (2, 2, Box(0, 0, 30, 20))
    assert (tiles.rows, tiles.columns, tiles.tokens, tiles.box) == (4, 6, 24, Box(0, 0, 30, 20))
    assert tiles.seams == ((2,), (2, 4))
    assert [tiles.cell(token) for token in (0, 1, 2, 4, 12)] == [(0, 0), (0, 1), (1, 0), (0, 2), (2, 0)]


def test_a_single_crop_is_the_picture() -> None:
    (view,) = crop_views(Calibration([tile(5, 0, 25, 20)], 16), (30, 20))
    assert (view.name, view.rows, view.columns, view.box) == ("picture", 4, 4, Box(5, 0, 25, 20))


@pytest.mark.parametrize(
    ("crops", "tokens", "message"),
    [
        ([WHOLE, *TILES], 27, "cannot place 27 visual tokens in 7 crops"),
        ([*TILES[:4], WHOLE], 20, "cannot place 4 crops that are no rows of 3"),
        ([WHOLE], 7, "cannot place 7 visual tokens in 8 x 8 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(crops: list[Crop], tokens: int, message: str) -> None:
    with pytest.raises(CannotPlaceError, match=message):
        crop_views(Calibration(crops, tokens), (30, 20))
