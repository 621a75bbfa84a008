"""Families whose text models mix attention with recurrent or convolutional layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
)

from zoo.grids import frames_video, image
from zoo.pieces import Member, Piece, without_types
from zoo.weights import END, IMAGE, START, TEXT, VIDEO, drawn

PATCH = 4
THUMBNAIL = 194
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}


def build_qwen3_5(seed: int) -> PreTrainedModel:
    """Qwen3.5: three layers of gated delta rule, then one of gated attention with partial M-RoPE."""
    config = Qwen3_5Config(text_config=TEXT | LINEAR, vision_config=QWEN_VISION, **IDS)
    return drawn(lambda: _with_long_memory(Qwen3_5ForConditionalGeneration(config)), seed)


def build_qwen3_5_moe(seed: int) -> PreTrainedModel:
    """Qwen3.5-MoE: the same with experts."""
    text = {name: value for name, value in TEXT.items() if name != "intermediate_size"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3_5MoeConfig(
        text_config=text | LINEAR | experts | {"shared_expert_intermediate_size": 48},
        vision_config=QWEN_VISION,
        **IDS,
    )
    return drawn(lambda: _with_long_memory(Qwen3_5MoeForConditionalGeneration(config)), seed)


def build_qwen4_exp(seed: int) -> PreTrainedModel:
    """Qwen4-Exp: four residual streams side by side; an indexer chooses the keys of a query in every fourth layer."""
    text = {name: value for name, value in TEXT.items() if name != "intermediate_size"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    index = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    config = Qwen4ExpConfig(
        text_config=text
        | LINEAR
        | experts
        | index
        | {
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "shared_expert_intermediate_size": 48,
            "hc_lowrank": 8,
        },
        vision_config=QWEN_VISION,
        **IDS,
    )
    return drawn(lambda: _with_long_memory(Qwen4ExpForConditionalGeneration(config)), seed)


def _with_long_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Slow decay: a state of one token alone may nearly vanish, and the norm behind it would amplify rounding."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(-4, -2)
    return model


def build_lfm2_vl(seed: int) -> PreTrainedModel:
    """LFM2-VL: short convolutions between layers of attention."""
    types = ["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "full_attention"]
    config = Lfm2VlConfig(
        text_config=TEXT
        | {
            "model_type": "lfm2",
            "layer_types": types,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 64,
            "vision_use_head": False,
        },
        image_token_id=IMAGE,
        projector_hidden_size=64,
        tie_word_embeddings=False,
    )
    return drawn(lambda: Lfm2VlForConditionalGeneration(config), seed)


def build_lfm3_vl(seed: int) -> PreTrainedModel:
    """LFM3-VL: convolutions, sliding layers and full ones, with gates, norms on both sides and a RoPE for each type."""
    config = Lfm3VlConfig(
        text_config=TEXT
        | {
            "model_type": "lfm3",
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "conv", "full_attention", "conv"] * 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": PATCH,
            "layer_types": ["conv", "full_attention"],
        },
        projector_hidden_size=64,
        tie_word_embeddings=False,
        **IDS,
    )
    return drawn(lambda: Lfm3VlForConditionalGeneration(config), seed)


def build_nemotron_h_omni(seed: int) -> PreTrainedModel:
    """Nemotron-H Omni: a layer is either Mamba-2, attention without RoPE, experts, or an MLP."""
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config=text
        | {
            "model_type": "nemotron_h",
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
            "head_dim": 16,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 48,
        },
        vision_config={
            "model_type": "radio",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": PATCH,
            "image_size": 8 * PATCH,
            "max_img_size": 8 * PATCH,
            "num_cls_tokens": 1,
            "num_registers": 1,
            "summary_idxs": [0],
            "video_temporal_patch_size": 2,
        },
        projector_hidden_size=64,
        vision_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=180,
    )
    return drawn(lambda: NemotronH_Omni_Reasoning_V3(config), seed)


def nemotron_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image between start and end; a grid without time."""
    piece = image(model, generator, number, patch=PATCH, depth=1)
    piece.tensors["image_grid_hw"] = piece.tensors.pop("image_grid_thw")[:, 1:]
    return piece


def lfm2_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Tiles, each behind its place, and a thumbnail; or the whole alone. Patches are padded to the most of any tile."""
    shapes = (((6, 8),), ((4, 4), (4, 4), (4, 6)), ((6, 4),))[number % 3]
    piece, pixels = Piece([START], [0], {}), torch.zeros(len(shapes), 48, 3 * PATCH * PATCH)
    for place, (height, width) in enumerate(shapes):
        pixels[place, : height * width] = torch.randn(height * width, pixels.shape[-1], generator=generator)
        last = place == len(shapes) - 1
        before = [] if len(shapes) == 1 else [THUMBNAIL if last else 160 + place]
        piece.ids += before + [IMAGE] * (height * width // 4)
        piece.types += [0] * len(before) + [1] * (height * width // 4)
    piece.ids.append(END)
    piece.types.append(0)
    counts = torch.tensor([height * width for height, width in shapes])
    piece.tensors = {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor(shapes),
        "pixel_attention_mask": (torch.arange(48) < counts[:, None]).long(),
    }
    return piece


_image, _video = partial(image, patch=PATCH), partial(frames_video, patch=PATCH)

MEMBERS = [
    Member("qwen3_5", build_qwen3_5, _image, _video),
    Member("qwen3_5_moe", build_qwen3_5_moe, _image, _video),
    Member("qwen4_exp", build_qwen4_exp, _image, _video),
    Member("lfm2_vl", build_lfm2_vl, lfm2_image, finish=without_types),
    Member("lfm3_vl", build_lfm3_vl, _image, _video, without_types),
    # No video: the model joins the features of a video as a list of tensors, though they are one.
    Member("nemotron_h_omni", build_nemotron_h_omni, nemotron_image, finish=without_types),
]
