"""Families with Qwen-VL's grids: images of any size as rows of patches, most with three-axis positions (M-RoPE)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from zoo.grids import VIDEO_GRIDS, frames_video, image, patches, timestamp, video
from zoo.pieces import Member, Piece, without_types
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


EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _qwen3_text() -> dict[str, Any]:
    """Without the ids that this text configuration does not know."""
    return {name: value for name, value in QWEN3_TEXT.items() if name not in ("bos_token_id", "eos_token_id")}


def build_qwen3_vl(seed: int) -> PreTrainedModel:
    """Qwen3-VL: norms of queries and keys; vision features are added behind the first two layers (DeepStack)."""
    config = Qwen3VLConfig(text_config=_qwen3_text(), vision_config=QWEN3_VISION, **IDS)
    return drawn(lambda: Qwen3VLForConditionalGeneration(config), seed)


def build_qwen3_vl_moe(seed: int) -> PreTrainedModel:
    """Qwen3-VL-MoE: two of four experts a token."""
    config = Qwen3VLMoeConfig(
        text_config=QWEN3_TEXT | EXPERTS | {"tie_word_embeddings": False}, vision_config=QWEN3_VISION, **IDS
    )
    return drawn(lambda: Qwen3VLMoeForConditionalGeneration(config), seed)


AUDIO: dict[str, Any] = {  # built, never fed
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "n_window": 4,
    "output_dim": 64,
}
OMNI_IDS: dict[str, Any] = {
    "audio_token_id": 180,
    "audio_start_token_id": 181,
    "audio_end_token_id": 182,
    "user_token_id": 183,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "position_id_per_seconds": 2,
}


def build_qwen2_5_omni(seed: int) -> PreTrainedModel:
    """The thinker of Qwen2.5-Omni."""
    config = Qwen2_5OmniThinkerConfig(
        audio_config=AUDIO,
        text_config=TEXT | {"rope_parameters": dict(MROPE), "tie_word_embeddings": False},
        vision_config=VISION | {"fullatt_block_indexes": [1], "window_size": 4 * PATCH},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **OMNI_IDS,
    )
    return drawn(lambda: Qwen2_5OmniThinkerForConditionalGeneration(config), seed)


def build_qwen3_omni_moe(seed: int) -> PreTrainedModel:
    """The thinker of Qwen3-Omni: Qwen3-VL-MoE with ears."""
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=AUDIO | {"downsample_hidden_size": 16},
        text_config=QWEN3_TEXT | EXPERTS,
        vision_config=QWEN3_VISION,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **OMNI_IDS,
    )
    return drawn(lambda: Qwen3OmniMoeThinkerForConditionalGeneration(config), seed)


def build_video_llama_3(seed: int) -> PreTrainedModel:
    """VideoLLaMA3: grids, but one-dimensional positions; a video's redundant tokens are left out."""
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = VideoLlama3Config(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=vision | {"patch_size": PATCH},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return drawn(lambda: VideoLlama3ForConditionalGeneration(config), seed)


def build_cosmos3_edge(seed: int) -> PreTrainedModel:
    """Cosmos3-Edge: M-RoPE on a text model with a plain two-layer MLP."""
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = Cosmos3EdgeConfig(
        text_config=TEXT | {"head_dim": 16, "rope_parameters": dict(MROPE)},
        vision_config=vision | {"patch_size": PATCH, "num_patches": 64},
        projector_hidden_size=64,
        **IDS,
    )
    return drawn(lambda: Cosmos3EdgeForConditionalGeneration(config), seed)


def build_cosmos3_omni(seed: int) -> PreTrainedModel:
    """Cosmos3-Omni: the reasoner, which is Qwen3-VL."""
    config = Cosmos3OmniConfig(
        text_config=_qwen3_text() | {"model_type": "qwen3_vl_text"},
        vision_config=QWEN3_VISION | {"model_type": "qwen3_vl_vision"},
        **IDS,
    )
    return drawn(lambda: Cosmos3OmniForConditionalGeneration(config), seed)


def timed_video(rate: str, model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """A video whose seconds per grid step are told beside, by this name."""
    piece = video(model, generator, number, patch=PATCH)
    piece.tensors[rate] = torch.tensor([1.0 + number])
    return piece


def unmerged_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """VideoLLaMA3: each patch of an image is a token, with nothing around them."""
    grid = ((1, 4, 3), (1, 2, 5), (1, 3, 3))[number % 3]
    piece = Piece([IMAGE] * (grid[1] * grid[2]), [1] * (grid[1] * grid[2]), {})
    piece.tensors = patches(generator, grid, PATCH, "pixel_values", "image_grid_thw", depth=1)
    piece.tensors["image_merge_sizes"] = torch.tensor([1])
    return piece


def compressed_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """VideoLLaMA3: behind each frame's timestamp those of its tokens that differ enough from the frame before."""
    grid = VIDEO_GRIDS[number % len(VIDEO_GRIDS)]
    kept = torch.rand(grid[0], grid[1] * grid[2] // 4, generator=generator) < 0.8
    kept[0] = True
    piece = Piece([], [], {})
    for count in kept.sum(1).tolist():
        piece.ids += timestamp(generator) + [VIDEO] * count
        piece.types += [0, 0, 0] + [2] * count
    piece.tensors = patches(generator, grid, PATCH, "pixel_values_videos", "video_grid_thw", depth=1)
    piece.tensors["video_merge_sizes"] = torch.tensor([2])
    piece.tensors["video_compression_mask"] = kept.flatten()
    return piece.cut(kept.sum(1).tolist())


MEMBERS = [
    Member("qwen2_5_vl", build_qwen2_5_vl, partial(image, patch=PATCH), partial(timed_video, "second_per_grid_ts")),
    Member("qwen2_vl", build_qwen2_vl, partial(image, patch=PATCH), partial(video, patch=PATCH)),
    Member("qwen3_vl", build_qwen3_vl, partial(image, patch=PATCH), partial(frames_video, patch=PATCH)),
    Member("qwen3_vl_moe", build_qwen3_vl_moe, partial(image, patch=PATCH), partial(frames_video, patch=PATCH)),
    Member(
        "qwen2_5_omni_thinker",
        build_qwen2_5_omni,
        partial(image, patch=PATCH),
        partial(timed_video, "video_second_per_grid"),
        without_types,
    ),
    Member(
        "qwen3_omni_moe_thinker",
        build_qwen3_omni_moe,
        partial(image, patch=PATCH),
        partial(timed_video, "video_second_per_grid"),
        without_types,
    ),
    Member("video_llama_3", build_video_llama_3, unmerged_image, compressed_video, without_types),
    Member(
        "cosmos3_edge",
        build_cosmos3_edge,
        partial(image, patch=PATCH, depth=1),
        partial(frames_video, patch=PATCH, depth=1),
    ),
    Member("cosmos3_omni", build_cosmos3_omni, partial(image, patch=PATCH), partial(frames_video, patch=PATCH)),
]
