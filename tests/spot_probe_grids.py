"""Image processors of the families that keep a picture's shape, by family: they run without torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import CohereCompassImageProcessorPil
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import Cosmos3EdgeImageProcessorPil
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glmga.image_processing_pil_glmga import GlmgaImageProcessorPil
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from zoo import MEMBERS
from zoo.pieces import Inputs
from zoo.weights import END, START

PATCH = 4
SIZE = {"shortest_edge": 1024, "longest_edge": 4096}  # in pixels of the whole
PIXELS = {"min_pixels": 1024, "max_pixels": 4096}


def _of(kind: Any, **settings: Any) -> Callable[[], Any]:
    return partial(kind, patch_size=PATCH, **settings)


_QWEN = _of(Qwen2VLImageProcessorPil, size=SIZE)
_GLM = _of(Glm46VImageProcessorPil, size=SIZE)

#: By member of the zoo: makes the image processor.
GRIDS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(
        (
            "cosmos3_omni",
            "exaone4_5",
            "hyperclovax_vision_v2",
            "lfm3_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_omni_moe_thinker",
            "qwen3_vl",
            "qwen3_vl_moe",
        ),
        _QWEN,
    ),
    "cohere_compass": _of(CohereCompassImageProcessorPil, size=SIZE),
    "cosmos3_edge": _of(Cosmos3EdgeImageProcessorPil, size=SIZE),
    "ernie4_5_vl_moe": _of(Ernie4_5_VLMoeImageProcessorPil, size=SIZE),
    "glm4v": _of(Glm4vImageProcessorPil, size=SIZE),
    **dict.fromkeys(("glm46v", "glm4v_moe", "glm_ocr"), _GLM),
    "glmga": _of(GlmgaImageProcessorPil, size=SIZE),
    "hunyuan_vl": _of(HunYuanVLImageProcessorPil, size=SIZE),
    "paddleocr_vl": _of(PaddleOCRVLImageProcessorPil, size=SIZE),
    "video_llama_3": _of(VideoLlama3ImageProcessorPil, size=SIZE),
}


def grid_inputs(family: str, model: Any, processor: Any, picture: Image.Image) -> Inputs:
    """A prompt with one picture, as the family's processor would make it of the image processor's outputs."""
    made = dict(processor(images=[picture], return_tensors="pt"))
    _, rows, columns = (made["image_grid_thw"][0] // processor.merge_size).tolist()
    count = rows * (columns + 1) + 2 if family == "hunyuan_vl" else rows * columns
    if family == "video_llama_3":
        made["image_merge_sizes"] = torch.tensor([processor.merge_size])
    return prompt_inputs(family, model, [int(model.config.image_token_id)] * count, made)


def prompt_inputs(family: str, model: Any, placeholders: list[int], made: Inputs) -> Inputs:
    """A few words, the placeholders, and a word."""
    ids = [5, START, *placeholders, END, 7]
    types = [0, 0, *[1] * len(placeholders), 0, 0]
    inputs = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([types])} | made
    finish = MEMBERS[family].finish
    return finish(model, inputs) if finish else inputs


def pixtral(merge: int) -> Any:
    """As mistral3's and LightOnOCR's processors call it: a token's pixels are its patch size."""
    return PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 7 * merge, "width": 7 * merge})


def stand_in(image_processor: Any) -> Any:
    """What `look` needs of a processor for families that tell their grids."""
    return SimpleNamespace(image_processor=image_processor)
