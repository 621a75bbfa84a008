"""Families whose decoder layers differ from one another or from the common form: windows, heads, fused weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    PreTrainedModel,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)

from zoo.grids import VIDEO_GRIDS, image, patches, timestamp
from zoo.pieces import Member, Piece, without_types
from zoo.weights import END, IMAGE, START, TEXT, VIDEO, drawn

PATCH = 4
LOCAL_START, LOCAL_END, NEWLINE, SEPARATOR = 194, 195, 196, 197
SIDE = 16 * PATCH  # pixels of the views of step3p7 and unlimited_ocr; 4 x 4 tokens are left of it
CROP = 8 * PATCH  # pixels of a crop of phi4_multimodal; 4 x 4 tokens are left of it
MOST_CROPS = 3
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2


def build_muse_glimmer(seed: int) -> PreTrainedModel:
    """Muse Glimmer: sliding layers with RoPE, full layers without; gated attention; capped logits."""
    text = TEXT | {"head_dim": 16, "sliding_window": 16, "layer_types": SLIDING, "output_multiplier": 1.0}
    config = MuseGlimmerConfig(
        text_config=text,
        vision_config=TOWER
        | {"pos_emb_height": 8, "pos_emb_width": 8, "layer_types": ["window_attention", "full_attention"]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=128,
        projector_hidden_size=64,
    )
    return drawn(lambda: MuseGlimmerForConditionalGeneration(config), seed)


def build_step3p7(seed: int) -> PreTrainedModel:
    """Step 3.7: sliding layers with more heads than the full ones, a RoPE for each type, a gate for each head."""
    config = Step3p7Config(
        text_config=TEXT
        | {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": SLIDING,
            "num_sliding_attention_heads": 6,
            "mlp_layer_types": ["dense"] + ["sparse"] * 7,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "share_expert_dim": 48,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            },
        },
        vision_config=TOWER | {"image_size": SIDE, "mlp_ratio": 2.0, "max_position_embeddings": 256},
        image_token_id=IMAGE,
    )
    return drawn(lambda: Step3p7ForConditionalGeneration(config), seed)


def build_unlimited_ocr(seed: int) -> PreTrainedModel:
    """Unlimited-OCR: what is generated attends to the whole prompt and to a window of what was generated before."""
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    sam = TOWER | {
        "image_size": SIDE,
        "output_channels": 16,
        "downsample_channels": [16, 32],
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
    }
    config = UnlimitedOcrConfig(
        text_config=TEXT | experts | {"num_key_value_heads": 4, "sliding_window": 3},
        vision_config={"sam_config": sam, "encoder_config": TOWER | {"image_size": 16, "hidden_size": 32}},
        image_token_id=IMAGE,
    )
    return drawn(lambda: UnlimitedOcrForConditionalGeneration(config), seed)


def build_phi4_multimodal(seed: int) -> PreTrainedModel:
    """Phi-4-multimodal: fused projections, partial RoPE, images embedded inside the text model."""
    config = Phi4MultimodalConfig(
        **TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        vision_config=TOWER | {"image_size": CROP, "crop_size": CROP, "image_token_id": IMAGE},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "input_size": 8,
            "nemo_conv_channels": 16,
            "audio_token_id": 198,
            "feature_layer": -1,
        },
    )
    return drawn(lambda: Phi4MultimodalForCausalLM(config), seed)


def separated_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Muse Glimmer: frames behind their timestamps, with separators between them, all between start and end."""
    grid = VIDEO_GRIDS[number % len(VIDEO_GRIDS)]
    count = grid[1] * grid[2] // 4
    piece = Piece([START], [0], {})
    for frame in range(grid[0]):
        piece.ids += timestamp(generator) + [VIDEO] * count + [END if frame == grid[0] - 1 else SEPARATOR]
        piece.types += [0, 0, 0] + [2] * count + [0]
    piece.tensors = patches(generator, grid, PATCH, "pixel_values_videos", "video_grid_thw")
    return piece.cut([count] * grid[0])


def step_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Step 3.7: local views of 4 tokens in two columns, then the whole in 16."""
    views = (2, 0, 4)[number % 3]
    piece = Piece([], [], {})
    for view in range(views):
        piece.ids += [LOCAL_START, *[IMAGE] * 4, LOCAL_END] + [NEWLINE] * (view % 2)
        piece.types += [0, *[1] * 4, 0] + [0] * (view % 2)
    piece.ids += [START, *[IMAGE] * 16, END]
    piece.types += [0, *[1] * 16, 0]
    piece.tensors = {
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
        "pixel_values_local": torch.randn(views, 3, SIDE // 2, SIDE // 2, generator=generator),
        "num_local_patches": torch.tensor([views]),
    }
    return piece


def unlimited_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Unlimited-OCR: the whole image, a newline for each row and a separator; all are placeholders.

    There are no local views, as the model wants their counts as plain numbers, not as tensors.
    """
    return Piece([IMAGE] * 21, [1] * 21, {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator)})


def phi4_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Crops whose padding is masked, a separator, and the whole; each row ends with a newline; all are placeholders."""
    rows, columns = ((1, 1), (1, 2), (2, 1))[number % 3]
    crops = rows * columns
    pixels = torch.zeros(1, MOST_CROPS, 3, CROP, CROP)
    pixels[:, : crops + 1] = torch.randn(crops + 1, 3, CROP, CROP, generator=generator)
    mask = torch.ones(1, MOST_CROPS, 8, 8, dtype=torch.bool)
    mask[:, 1 : crops + 1, 6:] = rows > 1
    useful = 3 if rows == 1 else 4 * rows
    count = useful * (4 * columns + 1) + 1 + 4 * 5
    tensors = {
        "image_pixel_values": pixels,
        "image_attention_mask": mask,
        "image_sizes": torch.tensor([[rows * CROP, columns * CROP]]),
    }
    return Piece([IMAGE] * count, [1] * count, tensors)


MEMBERS = [
    Member("muse_glimmer", build_muse_glimmer, partial(image, patch=PATCH), separated_video, without_types),
    Member("step3p7", build_step3p7, step_image, finish=without_types),
    Member(
        "unlimited_ocr",
        build_unlimited_ocr,
        unlimited_image,
        finish=without_types,
        cannot={"second_turn": "what was generated attends to less than the same tokens do in a prompt"},
    ),
    Member(
        "phi4_multimodal",
        build_phi4_multimodal,
        phi4_image,
        finish=without_types,
        cannot={"image_beams": "beam search gives the beams of a row with two images other images than the row's"},
    ),
]
