"""GLM-4V and other families with Qwen-VL's grids whose text model goes its own way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmgaConfig,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from zoo.grids import IMAGE_GRIDS, VIDEO_GRIDS, framed, image, patches, timestamp, video
from zoo.pieces import Inputs, Member, Piece, without_types
from zoo.weights import END, IMAGE, START, TEXT, VIDEO, drawn

PATCH = 4
VIDEO_START, VIDEO_END = 194, 195
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "image_size": 8 * PATCH,
    "patch_size": PATCH,
    "out_hidden_size": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HALF_MROPE = ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}


def _plain_text() -> dict[str, Any]:
    """Without the ids that these text configurations do not know."""
    return {name: value for name, value in TEXT.items() if name not in ("bos_token_id", "eos_token_id")}


def build_glm4v(seed: int) -> PreTrainedModel:
    """GLM-4.1V: norms before and behind, M-RoPE over half of a head's channels."""
    text = _plain_text() | {"rope_parameters": dict(HALF_MROPE)}
    config = Glm4vConfig(text_config=text, vision_config=VISION, **IDS)
    return drawn(lambda: Glm4vForConditionalGeneration(config), seed)


def build_glm4v_moe(seed: int) -> PreTrainedModel:
    """GLM-4.5V: one dense layer, then experts."""
    text = TEXT | EXPERTS | {"rope_parameters": dict(HALF_MROPE)}
    config = Glm4vMoeConfig(text_config=text, vision_config=VISION, **IDS)
    return drawn(lambda: Glm4vMoeForConditionalGeneration(config), seed)


def build_glm46v(seed: int, config_class: type[PretrainedConfig] = Glm46VConfig) -> PreTrainedModel:
    """GLM-4.6V, and what shares its class: the layers of GLM-4.1V."""
    text = _plain_text() | {"model_type": "glm4v_text", "rope_parameters": dict(HALF_MROPE)}
    config = config_class(text_config=text, vision_config=VISION | {"model_type": "glm4v_vision"}, **IDS)
    return drawn(lambda: Glm46VForConditionalGeneration(config), seed)


def build_glm_ocr(seed: int) -> PreTrainedModel:
    """GLM-OCR: M-RoPE over all of a head's channels."""
    text = _plain_text() | {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
    config = GlmOcrConfig(text_config=text, vision_config=VISION, **IDS)
    return drawn(lambda: GlmOcrForConditionalGeneration(config), seed)


def build_paddleocr_vl(seed: int) -> PreTrainedModel:
    """PaddleOCR-VL: ERNIE 4.5's text model with M-RoPE."""
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
    config = PaddleOCRVLConfig(
        text_config=text | {"tie_word_embeddings": False},
        vision_config=vision | {"image_size": 8 * PATCH, "patch_size": PATCH},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return drawn(lambda: PaddleOCRVLForConditionalGeneration(config), seed)


def build_ernie4_5_vl_moe(seed: int) -> PreTrainedModel:
    """ERNIE 4.5 VL: one set of experts for text, another for visual tokens."""
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [48, 32]}
    config = Ernie4_5_VLMoeConfig(
        text_config=TEXT | experts | {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
        vision_config={name: value for name, value in VISION.items() if name not in ("image_size", "out_hidden_size")},
        tie_word_embeddings=False,
        **IDS,
    )
    return drawn(lambda: Ernie4_5_VLMoeForConditionalGeneration(config), seed)


def build_hunyuan_vl(seed: int) -> PreTrainedModel:
    """HunYuan-VL: four axes of positions."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0, "mrope_section": [2] * 4}
    config = HunYuanVLConfig(
        text_config=TEXT | {"head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "out_hidden_size": 64,
            "patch_size": PATCH,
            "max_image_size": 8 * PATCH,
        },
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=VIDEO_START,
        tie_word_embeddings=False,
    )
    return drawn(lambda: HunYuanVLForConditionalGeneration(config), seed)


def build_exaone4_5(seed: int) -> PreTrainedModel:
    """EXAONE 4.5: sliding layers with RoPE, full layers without; norms behind attention and MLP only."""
    layer_types = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Exaone4_5_Config(
        text_config=TEXT | {"model_type": "exaone4", "sliding_window": 16, "layer_types": layer_types},
        vision_config={name: value for name, value in VISION.items() if name != "image_size"}
        | {"num_key_value_heads": 1, "fullatt_block_indexes": [1], "window_size": 4 * PATCH},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return drawn(lambda: Exaone4_5_ForConditionalGeneration(config), seed)


def build_hyperclovax_vision_v2(seed: int) -> PreTrainedModel:
    """HyperCLOVA X: norms on both sides of attention and MLP, scaled residuals and attention."""
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
    config = HyperCLOVAXVisionV2Config(
        text_config=TEXT | scales | {"model_type": "hyperclovax"},
        vision_config={name: value for name, value in VISION.items() if name != "image_size"}
        | {"model_type": "qwen2_5_vl_vision", "fullatt_block_indexes": [1], "window_size": 4 * PATCH},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return drawn(lambda: HyperCLOVAXVisionV2ForConditionalGeneration(config), seed)


def glm_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """A video of frames, each between the tokens of an image and before its timestamp, all between start and end."""
    grid = VIDEO_GRIDS[number % len(VIDEO_GRIDS)]
    piece = Piece([VIDEO_START], [0], {})
    for _ in range(grid[0]):
        frame = framed(IMAGE, 2, grid[1] * grid[2] // 4)
        piece.ids += frame.ids + timestamp(generator)
        piece.types += [*frame.types, 0, 0, 0]
    piece.ids.append(VIDEO_END)
    piece.types.append(0)
    piece.tensors = patches(generator, grid, PATCH, "pixel_values_videos", "video_grid_thw")
    return piece.cut([grid[1] * grid[2] // 4] * grid[0])


def square_patches_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """PaddleOCR-VL: patches that are not flattened."""
    piece = image(model, generator, number, patch=PATCH, depth=1)
    piece.tensors["pixel_values"] = piece.tensors["pixel_values"].unflatten(1, (3, PATCH, PATCH))
    return piece


def paired_frames_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """ERNIE 4.5 VL: the model itself merges two frames into one step."""
    grid = ((4, 4, 4), (2, 4, 6))[number % 2]
    piece = framed(VIDEO, 2, grid[0] * grid[1] * grid[2] // 8)
    piece.ids[0], piece.ids[-1] = VIDEO_START, VIDEO_END
    piece.tensors = patches(generator, grid, PATCH, "pixel_values_videos", "video_grid_thw", depth=1)
    return piece.cut([grid[1] * grid[2] // 4] * (grid[0] // 2))


def rows_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """HunYuan-VL: the model adds a newline to each row of tokens, one begin and one end; all are placeholders."""
    grid = IMAGE_GRIDS[number % len(IMAGE_GRIDS)]
    piece = framed(IMAGE, 1, grid[1] // 2 * (grid[2] // 2 + 1) + 2)
    piece.tensors = patches(generator, grid, PATCH, "pixel_values", "image_grid_thw", depth=1)
    return piece


def moe_types(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """ERNIE 4.5 VL: which experts serve a token; those of its start and end go with the visual ones."""
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"].clone()
    types[(ids == START) | (ids == END)] = 1
    types[(ids == VIDEO_START) | (ids == VIDEO_END)] = 2
    return inputs | {"moe_mm_token_type_ids": types}


# An image's placeholder also stands for a frame, and the model counts it without looking at mm_token_type_ids.
GLM_CANNOT = {
    "mixed": "the placeholders of a video's frames are counted as an image's",
    "video_beams": "beam search repeats a video by its own placeholder, which is not in the text",
    "image_beams": "beam search gives the beams of a row with two images other images than the row's",
}

_image, _video = partial(image, patch=PATCH), partial(video, patch=PATCH)

MEMBERS = [
    Member("glm4v", build_glm4v, _image, glm_video, cannot=GLM_CANNOT),
    Member("glm4v_moe", build_glm4v_moe, _image, glm_video, cannot=GLM_CANNOT),
    Member("glm46v", build_glm46v, _image, glm_video, cannot=GLM_CANNOT),
    Member("glmga", partial(build_glm46v, config_class=GlmgaConfig), _image, glm_video, cannot=GLM_CANNOT),
    Member("glm_ocr", build_glm_ocr, _image, glm_video, cannot=GLM_CANNOT),
    Member("paddleocr_vl", build_paddleocr_vl, square_patches_image),
    Member(
        "ernie4_5_vl_moe",
        build_ernie4_5_vl_moe,
        partial(image, patch=PATCH, depth=1),
        paired_frames_video,
        moe_types,
        {"use_cache": "without a cache, generate does not extend moe_mm_token_type_ids"},
    ),
    Member("hunyuan_vl", build_hunyuan_vl, rows_image),
    Member("exaone4_5", build_exaone4_5, _image, _video, without_types),
    Member("hyperclovax_vision_v2", build_hyperclovax_vision_v2, _image, _video, without_types),
]
