"""Families with Qwen-VL's grids: images of any size as rows of patches, most with three-axis positions (M-RoPE)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from zoo.grids import VIDEO_GRIDS, framed, image, patches, video
from zoo.pieces import Member, Piece
from zoo.weights import END, IMAGE, START, TEXT, VIDEO, drawn

PATCH = 4
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def build_qwen2_vl(seed: int) -> PreTrainedModel:
    """Qwen2-VL: a text model of Qwen2's layers."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": dict(MROPE)}, vision_config=vision, **IDS)
    return drawn(lambda: Qwen2VLForConditionalGeneration(config), seed)


def build_qwen2_5_vl(seed: int) -> PreTrainedModel:
    """Qwen2.5-VL: windowed attention in the vision tower, absolute time in a video's positions."""
    vision = VISION | {"fullatt_block_indexes": [1], "window_size": 4 * PATCH, "tokens_per_second": 2}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": dict(MROPE)}, vision_config=vision, **IDS)
    return drawn(lambda: Qwen2_5_VLForConditionalGeneration(config), seed)


QWEN3_TEXT = TEXT | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_interleaved": True}}
QWEN3_VISION = VISION | {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


def build_qwen3_vl(seed: int) -> PreTrainedModel:
    """Qwen3-VL: norms of queries and keys; vision features are added behind the first two layers (DeepStack)."""
    text = {name: value for name, value in QWEN3_TEXT.items() if name not in ("bos_token_id", "eos_token_id")}
    config = Qwen3VLConfig(text_config=text, vision_config=QWEN3_VISION, **IDS)
    return drawn(lambda: Qwen3VLForConditionalGeneration(config), seed)


def build_qwen3_vl_moe(seed: int) -> PreTrainedModel:
    """Qwen3-VL-MoE: two of four experts a token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3VLMoeConfig(
        text_config=QWEN3_TEXT | experts | {"tie_word_embeddings": False}, vision_config=QWEN3_VISION, **IDS
    )
    return drawn(lambda: Qwen3VLMoeForConditionalGeneration(config), seed)


def qwen2_5_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """A video whose sampling rate is told beside."""
    piece = video(model, generator, number, patch=PATCH)
    piece.tensors["second_per_grid_ts"] = torch.tensor([1.0 + number])
    return piece


def qwen3_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """A video whose frames stand one by one, each behind its timestamp and between start and end."""
    grid = VIDEO_GRIDS[number % len(VIDEO_GRIDS)]
    piece = Piece([], [], {})
    for _ in range(grid[0]):
        timestamp = torch.randint(2, 150, (3,), generator=generator).tolist()
        part = framed(VIDEO, 2, grid[1] * grid[2] // 4)
        piece.ids += timestamp + part.ids
        piece.types += [0] * len(timestamp) + part.types
    piece.tensors = patches(generator, grid, PATCH, "pixel_values_videos", "video_grid_thw")
    return piece


MEMBERS = [
    Member("qwen2_5_vl", build_qwen2_5_vl, partial(image, patch=PATCH), qwen2_5_video),
    Member("qwen2_vl", build_qwen2_vl, partial(image, patch=PATCH), partial(video, patch=PATCH)),
    Member("qwen3_vl", build_qwen3_vl, partial(image, patch=PATCH), qwen3_video),
    Member("qwen3_vl_moe", build_qwen3_vl_moe, partial(image, patch=PATCH), qwen3_video),
]
