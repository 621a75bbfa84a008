"""A picture with one lit spot: the visual token whose place covers the spot is the one whose pixels are lit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pyramiddrop.report.layout import look

SIZES = [(120, 120), (260, 90), (90, 260)]
SPOTS = [(0.1, 0.2), (0.75, 0.4), (0.55, 0.9)]
SQUARE = {"height": 64, "width": 64}
#: Family, image processor, patch size.
DYNAMIC = [
    ("qwen2_vl", Qwen2VLImageProcessorPil, 14),
    ("qwen2_5_vl", Qwen2VLImageProcessorPil, 14),
    ("qwen3_vl", Qwen2VLImageProcessorPil, 16),
    ("qwen3_vl_moe", Qwen2VLImageProcessorPil, 16),
    ("glm4v", Glm4vImageProcessorPil, 14),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "kind", "patch"), DYNAMIC, ids=[case[0] for case in DYNAMIC])
def test_dynamic_resolution(family: str, kind: Any, patch: int, size: tuple[int, int]) -> None:
    processor = kind(patch_size=patch, size={"shortest_edge": 3136, "longest_edge": 200_000})
    config = SimpleNamespace(model_type=family, vision_config=SimpleNamespace(spatial_merge_size=2))
    lit = [_lit(size, place) for place in SPOTS]
    batch = processor(images=lit, return_tensors="pt")
    seen = look(config, processor, lit, batch["image_grid_thw"])
    tokens = batch["pixel_values"].mean(-1).unflatten(0, (-1, 4)).mean(-1)  # four patches one after another merge
    assert sum(one.view.tokens for one in seen) == len(tokens)
    pixels = tokens.split([one.view.tokens for one in seen])
    for one, values, place in zip(seen, pixels, SPOTS, strict=True):
        _assert_covers(one.view, int(values.argmax()), size, place)


def test_dynamic_resolution_needs_a_grid_for_each_picture() -> None:
    config = SimpleNamespace(model_type="qwen2_vl", vision_config=SimpleNamespace(spatial_merge_size=2))
    for grids in (None, [(1, 4, 4)] * 2):
        with pytest.raises(ValueError, match="qwen2_vl needs the processor's image_grid_thw"):
            look(config, None, [Image.new("RGB", (50, 50))], grids)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_one_square(family: str, size: tuple[int, int]) -> None:
    kind: Any = Gemma3ImageProcessorPil if family == "gemma3" else SiglipImageProcessorPil
    vision = SimpleNamespace(image_size=64, patch_size=8)
    config = SimpleNamespace(model_type=family, mm_tokens_per_image=64, vision_config=vision)
    for place in SPOTS:
        picture = _lit(size, place)
        pixels = kind(size=SQUARE)(images=[picture], return_tensors="pt")["pixel_values"]
        tokens = torch.nn.functional.avg_pool2d(pixels.mean(1), 8).flatten()
        (seen,) = look(config, kind(), [picture])
        assert seen.view.tokens == len(tokens)
        _assert_covers(seen.view, int(tokens.argmax()), size, place)


def test_gemma_3_with_pan_and_scan_is_refused() -> None:
    config = SimpleNamespace(model_type="gemma3", mm_tokens_per_image=64)
    with pytest.raises(ValueError, match="do_pan_and_scan"):
        look(config, SimpleNamespace(do_pan_and_scan=True), [Image.new("RGB", (50, 50))])


def _lit(size: tuple[int, int], place: tuple[float, float]) -> Image.Image:
    """Black, with a soft white spot at `place`, which is told as shares of width and height."""
    columns, rows = np.arange(size[0])[None] + 0.5, np.arange(size[1])[:, None] + 0.5
    distance = (columns - place[0] * size[0]) ** 2 + (rows - place[1] * size[1]) ** 2
    return Image.fromarray((255 * np.exp(-distance / 18)).astype(np.uint8)).convert("RGB")


def _assert_covers(view: Any, token: int, size: tuple[int, int], place: tuple[float, float]) -> None:
    """The spot lies in the token's cell, or less than a fifth of a cell beside it."""
    cell = view.cell(token)
    row = (place[1] * size[1] - view.box.top) / (view.box.height / view.rows)
    column = (place[0] * size[0] - view.box.left) / (view.box.width / view.columns)
    assert -0.2 <= row - cell[0] <= 1.2
    assert -0.2 <= column - cell[1] <= 1.2
