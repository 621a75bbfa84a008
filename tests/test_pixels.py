"""Pictures of every mode become RGB: their greys and colours stay what they are, or the mode is refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import load_processor
from pyramiddrop.inference.prompt import build_inputs, open_picture, to_rgb
from pyramiddrop.inference.video import open_video

GREYS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 23
SIXTEEN = GREYS.astype(np.uint16) * 257
RED_GREEN = np.stack([GREYS, 255 - GREYS, GREYS * 0], -1)


def grey(picture: Image.Image) -> np.ndarray:
    """The grey values of an RGB picture without any colour."""
    values = np.asarray(picture)
    assert picture.mode == "RGB"
    assert (values == values[..., :1]).all()
    return values[..., 0]


def bytes_of(picture: Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_in_files(kind: str) -> None:
    """Pillow opens a PGM as mode I, the others as I;16."""
    assert (grey(open_picture(bytes_of(Image.fromarray(SIXTEEN), kind))) == GREYS).all()


def test_sixteen_bits_of_both_byte_orders() -> None:
    assert (grey(to_rgb(Image.fromarray(SIXTEEN.astype("<u2")))) == GREYS).all()
    big_endian = Image.frombytes("I;16B", (4, 3), SIXTEEN.astype(">u2").tobytes())
    assert (grey(to_rgb(big_endian)) == GREYS).all()


def test_sixteen_bits_on_their_side(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SIXTEEN).save(tmp_path / "a.png", exif=exif)
    assert (grey(open_picture(tmp_path / "a.png")) == np.rot90(GREYS, -1)).all()


def test_moving_pictures_of_sixteen_bits(tmp_path: Path) -> None:
    frames = [Image.fromarray(SIXTEEN), Image.fromarray(SIXTEEN[::-1])]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    first, second = open_video(tmp_path / "a.tif", 2).frames
    assert (grey(first) == GREYS).all()
    assert (grey(second) == GREYS[::-1]).all()


def test_floats_from_0_to_1() -> None:
    assert (grey(open_picture(bytes_of(Image.fromarray(GREYS / np.float32(255)), "TIFF"))) == GREYS).all()


@pytest.mark.parametrize("values", [GREYS.astype(np.float32), GREYS - np.float32(3), GREYS.astype(np.int32)])
def test_a_range_that_is_not_known_is_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: mode [IF] with values from .* has no known range; save it with 8"):
        open_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none(number: float) -> None:
    values = np.full((3, 4), 0.5, dtype=np.float32)
    values[1, 1] = number
    with pytest.raises(InputError, match="no known range"):
        to_rgb(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "YCbCr", "HSV"])
def test_colours_stay(mode: str) -> None:
    found = np.asarray(to_rgb(Image.fromarray(RED_GREEN).convert(mode))).astype(int)
    assert np.abs(found - RED_GREEN).max() <= 8


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_greys_stay(mode: str) -> None:
    values = GREYS if mode != "1" else np.where(GREYS > 127, 255, 0).astype(np.uint8)
    assert (grey(to_rgb(Image.fromarray(values).convert(mode))) == values).all()


def test_a_palette_with_transparency() -> None:
    palette = Image.fromarray(RED_GREEN).quantize()
    data = bytes_of(palette, "PNG", transparency=0)
    assert (np.asarray(open_picture(data)) == np.asarray(palette.convert("RGB"))).all()


def test_a_mode_that_pillow_cannot_convert() -> None:
    with pytest.raises(InputError, match="mode La cannot be converted to RGB; save it as an RGB picture"):
        to_rgb(Image.new("La", (2, 2)))


def test_pictures_that_a_program_gives(llava_folder: Path) -> None:
    """Transformers' processor alone would clip them."""
    processor = load_processor(llava_folder)
    wide, narrow = (
        build_inputs(processor, [picture], "w5") for picture in (Image.fromarray(SIXTEEN), Image.fromarray(GREYS))
    )
    assert torch.equal(wide["pixel_values"], narrow["pixel_values"])
