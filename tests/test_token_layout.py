"""The views that are worked out for a picture are those that the family's own processor makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyramiddrop.inference.checkpoint import load_processor, read_config
from pyramiddrop.inference.prompt import build_inputs
from pyramiddrop.report.token_layout.crops import calibrate
from pyramiddrop.report.token_layout.geometry import Box, View
from pyramiddrop.report.token_layout.views import CannotPlaceError, place_pictures
from tiny import CROP

PATCH = CROP // 4
SIZES = [(90, 60), (60, 90), (80, 80), (200, 70), (70, 200)]


@pytest.mark.parametrize("size", SIZES)
def test_llava_sees_the_light_where_its_view_says(llava_folder: Path, size: tuple[int, int]) -> None:
    config, processor = read_config(llava_folder), load_processor(llava_folder)
    for place in ((0.5, 0.5), (0.45, 0.58)):
        picture, spot = _lit(size, place)
        (seen,) = place_pictures(config, processor, [picture])
        pixels = build_inputs(processor, [picture], "w7")["pixel_values"]
        assert _covers(seen.view, _brightest(pixels[0]), spot)


@pytest.mark.parametrize("size", SIZES)
def test_llava_next_sees_the_light_in_both_views(next_folder: Path, size: tuple[int, int]) -> None:
    config, processor = read_config(next_folder), load_processor(next_folder)
    for place in ((0.1, 0.2), (0.7, 0.9)):
        picture, spot = _lit(size, place)
        base, tiles = (seen.view for seen in place_pictures(config, processor, [picture]))
        pixels = build_inputs(processor, [picture], "w7")["pixel_values"][0]
        assert _covers(base, _brightest(pixels[0]), spot)
        row, column = _brightest(_together(pixels[1:], config, picture))
        top, left = _cut_off(tiles, config, picture)
        assert _covers(tiles, (row - top, column - left), spot)


def test_the_views_have_as_many_tokens_as_the_prompt(next_folder: Path, llava_folder: Path) -> None:
    pictures = [Image.new("RGB", size) for size in SIZES]
    for folder in (next_folder, llava_folder):
        config, processor = read_config(folder), load_processor(folder)
        seen = place_pictures(config, processor, pictures)
        ids = build_inputs(processor, pictures, "w7")["input_ids"]
        assert sum(one.view.tokens for one in seen) == int((ids == config.image_token_index).sum())
        assert seen[0].view.name.endswith(" 1")


def test_a_processor_is_asked_once_for_pictures_of_one_size(
    llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def counted(config: Any, processor: Any, size: tuple[int, int]) -> Any:
        asked.append(size)
        return calibrate(config, processor, size)

    monkeypatch.setattr("pyramiddrop.report.token_layout.crops.calibrate", counted)
    pictures = [Image.new("RGB", size) for size in (SIZES[0], SIZES[1], SIZES[0])]
    seen = place_pictures(read_config(llava_folder), load_processor(llava_folder), pictures)
    assert asked == SIZES[:2]
    assert seen[0].view.box == seen[2].view.box != seen[1].view.box


def test_a_class_token_that_stays_has_no_place(llava_folder: Path) -> None:
    config, processor = read_config(llava_folder), load_processor(llava_folder)
    config.vision_feature_select_strategy = "full"
    (seen,) = place_pictures(config, processor, [Image.new("RGB", (50, 50))])
    assert (seen.view.cell(0), seen.view.tokens) == (None, 17)
    config.vision_config.model_type = "siglip_vision_model"  # it never had one
    (seen,) = place_pictures(config, processor, [Image.new("RGB", (50, 50))])
    assert (seen.view.cell(0), seen.view.tokens) == ((0, 0), 16)


def test_a_vision_tower_without_a_fixed_grid_is_refused(llava_folder: Path) -> None:
    config = read_config(llava_folder)
    config.vision_config.model_type = "odd_vision"
    with pytest.raises(CannotPlaceError, match="cannot place the visual tokens of a 'odd_vision' vision tower"):
        place_pictures(config, None, [Image.new("RGB", (50, 50))])


def test_a_pixtral_tower_keeps_the_pictures_shape(llava_folder: Path) -> None:
    config = read_config(llava_folder)
    config.vision_config.model_type = "pixtral"
    (seen,) = place_pictures(config, None, [Image.new("RGB", (50, 30))], {"image_sizes": [(2 * PATCH, 3 * PATCH)]})
    assert (seen.view.rows, seen.view.columns, seen.view.box) == (2, 3, Box(0, 0, 50, 30))


def test_windows_of_patches_that_are_not_full_stick_out_of_the_picture() -> None:
    # 3 x 3 patches of 10 x 20 pixels in windows of 2 x 2: the last row and column of windows are half full
    pooling = [[0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]
    inputs = {"image_grids": [[1, 1, 2, 2]], "image_token_pooling": torch.tensor([[0, 1, 2, 3], *pooling])}
    whole, picture = place_pictures(SimpleNamespace(model_type="molmo2"), None, [Image.new("RGB", (30, 60))], inputs)
    assert (whole.view.tokens, whole.view.box) == (1, Box(0, 0, 30, 60))
    assert (picture.view.rows, picture.view.columns, picture.view.box) == (2, 2, Box(0, 0, 40, 80))


def test_frames_stand_behind_the_pictures_and_tell_their_moment() -> None:
    merging = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor = SimpleNamespace(image_processor=merging, video_processor=merging)
    picture, clip = Image.new("RGB", (8, 8)), _frames(5)
    inputs = {"image_grid_thw": [(1, 2, 4)], "video_grid_thw": [(3, 4, 2)]}
    seen = place_pictures(SimpleNamespace(model_type="qwen2_vl"), processor, [picture], inputs, [clip])
    assert [one.view.name for one in seen] == ["picture", "frames 1-2", "frames 3-4", "frame 5"]


def test_several_videos_are_numbered() -> None:
    merging = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor = SimpleNamespace(image_processor=merging, video_processor=merging)
    clip, short = _frames(5), _frames(2)
    inputs = {"video_grid_thw": torch.tensor([(3, 4, 2), (1, 2, 2)])}
    seen = place_pictures(SimpleNamespace(model_type="glm4v"), processor, [], inputs, [clip, short])
    assert [one.view.name for one in seen] == [
        "frames 1-2 of video 1",
        "frames 3-4 of video 1",
        "frame 5 of video 1",
        "frames 1-2 of video 2",
    ]
    assert [one.moment for one in seen] == [0, 2, 4, 0]
    assert [one.picture for one in seen] == [clip[0], clip[2], clip[4], short[0]]
    assert [(one.view.rows, one.view.columns) for one in seen] == [(2, 1)] * 3 + [(1, 1)]


def test_videos_that_cannot_be_placed_say_why() -> None:
    merging = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor = SimpleNamespace(video_processor=merging)
    with pytest.raises(ValueError, match="the processor made 2 times 2 frames of a video of 5"):
        place_pictures(
            SimpleNamespace(model_type="qwen2_vl"), processor, [], {"video_grid_thw": [(2, 2, 2)]}, [_frames(5)]
        )
    with pytest.raises(ValueError, match="needs the processor's video_grid_thw, one row a video"):
        place_pictures(SimpleNamespace(model_type="qwen2_vl"), processor, [], {}, [_frames(5)])
    with pytest.raises(CannotPlaceError, match="of a video of model type 'video_llama_3': nobody has worked out here"):
        place_pictures(SimpleNamespace(model_type="video_llama_3"), processor, [], {}, [_frames(5)])


def _frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(count)]


def _lit(size: tuple[int, int], place: tuple[float, float]) -> tuple[Image.Image, tuple[float, float]]:
    """A black picture with a white spot, and the spot's centre in pixels (x, y)."""
    width, height = size
    x, y = place[0] * width, place[1] * height
    columns, rows = np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5
    distance = (columns - x) ** 2 + (rows - y) ** 2
    values = (255 * np.exp(-distance / (2 * (min(size) / 30) ** 2))).astype(np.uint8)
    return Image.fromarray(values).convert("RGB"), (x, y)


def _brightest(pixels: torch.Tensor) -> tuple[int, int]:
    """Row and column of the patch with the most light; pixels are (3, H, W)."""
    light = torch.nn.functional.avg_pool2d(pixels.mean(0)[None], PATCH)[0]
    row, column = divmod(int(light.argmax()), light.shape[1])
    return row, column


def _covers(view: View, cell: tuple[int, int], spot: tuple[float, float]) -> bool:
    """Whether the spot lies in this cell, or less than a fifth of a cell beside it."""
    width, height = view.box.width / view.columns, view.box.height / view.rows
    row, column = (spot[1] - view.box.top) / height, (spot[0] - view.box.left) / width
    return -0.2 <= row - cell[0] <= 1.2 and -0.2 <= column - cell[1] <= 1.2


def _together(tiles: torch.Tensor, config: Any, picture: Image.Image) -> torch.Tensor:
    rows, columns = _tile_grid(config, picture)
    grid = tiles[: rows * columns].reshape(rows, columns, 3, CROP, CROP)
    return grid.permute(2, 0, 3, 1, 4).reshape(3, rows * CROP, columns * CROP)


def _cut_off(view: View, config: Any, picture: Image.Image) -> tuple[int, int]:
    """Rows above and columns to the left of the grid that hold nothing but padding."""
    rows, columns = _tile_grid(config, picture)
    return (rows * 4 - view.rows) // 2, (columns * 4 - view.columns) // 2


def _tile_grid(config: Any, picture: Image.Image) -> tuple[int, int]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape((picture.height, picture.width), config.image_grid_pinpoints, CROP)
    return int(rows), int(columns)
