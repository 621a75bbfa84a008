"""Families whose attention compresses keys and values (MLA), or chooses blocks of keys by an indexer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    PreTrainedModel,
)

from zoo.grids import IMAGE_GRIDS, framed, frames_video, image, patches, timestamp
from zoo.pieces import Member, Piece, without_types
from zoo.weights import END, IMAGE, START, TEXT, VIDEO, drawn

PATCH = 4
BREAK, CONTENT = 194, 195
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
RANKS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


def build_kimi_k25(seed: int) -> PreTrainedModel:
    """Kimi K2.5: DeepSeek-V3's text model."""
    config = Kimi_K25Config(
        text_config=TEXT | RANKS | {"model_type": "deepseek_v3"},
        vision_config=TOWER | {"pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return drawn(lambda: Kimi_K25ForConditionalGeneration(config), seed)


def build_mistral4(seed: int) -> PreTrainedModel:
    """Mistral3 around Mistral4's text model: MLA with queries that grow with their position."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    config = Mistral3Config(
        text_config=TEXT | RANKS | {"model_type": "mistral4", "rope_parameters": rope},
        vision_config=TOWER | {"model_type": "pixtral", "image_size": 16 * PATCH, "head_dim": 16},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return drawn(lambda: Mistral3ForConditionalGeneration(config), seed)


def build_mistral_large4(seed: int) -> PreTrainedModel:
    """Mistral Large 4: an indexer chooses the keys of a query; some layers take the choice or keys of one before."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }
    ranks = {name: value for name, value in RANKS.items() if name not in ("q_lora_rank", "first_k_dense_replace")}
    config = MistralLarge4Config(
        text_config=TEXT
        | ranks
        | {
            "rope_parameters": rope,
            "index_topk": 12,
            "index_head_dim": 16,
            "index_n_heads": 16,  # with few, many scores are exactly 0, and which of them are chosen is chance
            "indexer_types": ["full", "shared"] * 4,
            "kv_source_layers": [0, 1, 1, 3, 4, 5, 5, 7],
        },
        vision_config=TOWER | {"model_type": "pixtral", "image_size": 16 * PATCH, "head_dim": 16},
        image_token_index=IMAGE,
    )
    return drawn(lambda: MistralLarge4ForConditionalGeneration(config), seed)


def build_deepseek_ocr2(seed: int) -> PreTrainedModel:
    """DeepSeek-OCR 2: its published text models have no MLA, but the experts of DeepSeek-V2."""
    sam = TOWER | {
        "image_size": 16 * PATCH,
        "output_channels": 16,
        "downsample_channels": [16, 32],
        "window_size": 4,
        "global_attn_indexes": [1],
    }
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    encoder = TEXT | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = DeepseekOcr2Config(
        text_config=TEXT | experts | {"num_key_value_heads": 4, "mlp_layer_types": ["dense"] + ["sparse"] * 7},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=IMAGE,
    )
    return drawn(lambda: _with_few_queries(DeepseekOcr2ForConditionalGeneration(config)), seed)


def _with_few_queries(model: PreTrainedModel) -> PreTrainedModel:
    """The class fixes 144 visual tokens a view; nine keep the prompts short."""
    model.model.vision_tower.query_768_resolution = nn.Embedding(9, 32)
    return model


def build_minimax_m3_vl(seed: int) -> PreTrainedModel:
    """MiniMax-M3: every other layer attends to the few blocks of keys that an indexer chooses for a query."""
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = MiniMaxM3VLConfig(
        text_config=TEXT
        | index
        | experts
        | {
            "head_dim": 16,
            "rotary_dim": 8,
            "rope_parameters": rope,
            "dense_intermediate_size": 96,
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 4,
            "mlp_layer_types": ["dense"] + ["sparse"] * 7,
        },
        vision_config=TOWER | {"hidden_size": 48, "image_size": 8 * PATCH},
        projector_hidden_size=64,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return drawn(lambda: MiniMaxM3SparseForConditionalGeneration(config), seed)


def kimi_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image behind a start token, a word, and a content token; its patches are not flat."""
    grid = IMAGE_GRIDS[number % len(IMAGE_GRIDS)]
    piece = _media(IMAGE, 1, grid[1] * grid[2] // 4)
    piece.tensors = patches(generator, grid, PATCH, "pixel_values", "image_grid_thw", depth=1)
    piece.tensors["pixel_values"] = piece.tensors["pixel_values"].unflatten(1, (3, PATCH, PATCH))
    return piece


def kimi_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """A video of chunks, each behind a timestamp; of one frame, as the model splits longer ones wrongly."""
    chunks = [(1, 4, 4), (1, 4, 4), (1, 4, 4)][: 3 - number % 2]
    piece, pixels = Piece([], [], {}), []
    for grid in chunks:
        part = _media(VIDEO, 2, grid[1] * grid[2] // 4)
        piece.ids += timestamp(generator) + part.ids
        piece.types += [0, 0, 0, *part.types]
        pixels.append(torch.randn(grid[1] * grid[2], 3, PATCH, PATCH, generator=generator))
    piece.tensors = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(chunks)}
    return piece.cut([4] * len(chunks))


def _media(token: int, kind: int, count: int) -> Piece:
    piece = framed(token, kind, count)
    return Piece([START, 2 + kind, CONTENT, *piece.ids[1:]], [0, 0, *piece.types], {})


def pixtral_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image of its own size on a canvas that fits any; a break behind each row of tokens, an end behind the last."""
    height, width = ((24, 32), (16, 24), (24, 16))[number % 3]
    rows, columns = height // (2 * PATCH), width // (2 * PATCH)
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    ids = ([IMAGE] * columns + [BREAK]) * rows
    ids[-1] = END
    types = ([1] * columns + [0]) * rows
    return Piece(ids, types, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


def views_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """DeepSeek-OCR 2: local views, the whole, and a separator, all under the placeholder."""
    views = (1, 0, 2)[number % 3]
    count = 9 * (views + 1) + 1
    tensors = {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
        "pixel_values_local": torch.randn(views, 3, 64, 64, generator=generator),
        "num_local_patches": torch.tensor([views]),
    }
    return Piece([IMAGE] * count, [1] * count, tensors)


MEMBERS = [
    Member("kimi_k25", build_kimi_k25, kimi_image, kimi_video, without_types),
    Member(
        "mistral3-mistral4",
        build_mistral4,
        pixtral_image,
        finish=without_types,
        cannot={"left_padding": "without position_ids, queries are scaled by their slot in the padded row"},
    ),
    Member(
        "mistral_large4",
        build_mistral_large4,
        pixtral_image,
        finish=without_types,
        cannot={
            "left_padding": "without position_ids, queries are scaled by their slot in the padded row",
            "checkpointing": "gradients through keys and values that layers share are wrong when they are recomputed",
        },
    ),
    Member("deepseek_ocr2", build_deepseek_ocr2, views_image, finish=without_types),
    Member(
        "minimax_m3_vl",
        build_minimax_m3_vl,
        partial(image, patch=PATCH),
        partial(frames_video, patch=PATCH),
        without_types,
        {"left_padding": "the indexer's blocks of keys begin at the first slot, padded or not"},
    ),
]
