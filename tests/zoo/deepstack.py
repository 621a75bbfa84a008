"""Families beside Qwen3-VL that add vision features behind the first decoder layers (DeepStack)."""

from __future__ import annotations

from functools import partial

import torch
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    PreTrainedModel,
)

from zoo.grids import frames_video, image
from zoo.pieces import Inputs, Member, Piece, without_types
from zoo.weights import END, IMAGE, START, TEXT, VIDEO, drawn

PATCH = 4
TILE, TILE_TOKENS = 8 * PATCH, 4  # pixels on a side, and tokens that are left of its 8 x 8 patches
AROUND, NEWLINE, GLOBAL = 194, 195, 196
MOST_TILES = 5


def build_granite_docling(seed: int) -> PreTrainedModel:
    """Granite Docling: Granite's scaled residuals, attention and logits."""
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
    config = GraniteDoclingConfig(
        text_config=TEXT | scales | {"tie_word_embeddings": False},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return drawn(lambda: GraniteDoclingForConditionalGeneration(config), seed)


def build_cohere_compass(seed: int) -> PreTrainedModel:
    """North Micro Vision: sliding layers with M-RoPE and full layers without; attention beside the MLP."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = CohereCompassConfig(
        text_config=TEXT
        | {
            "rope_parameters": {"sliding_attention": rope, "full_attention": None},
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "logit_scale": 0.25,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return drawn(lambda: CohereCompassForConditionalGeneration(config), seed)


def tiles_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Rows of tiles, each behind its place, and a thumbnail where there are several."""
    rows, columns = ((1, 2), (1, 1), (2, 2))[number % 3]
    piece = Piece([], [], {})
    for row in range(rows):
        for column in range(columns):
            _add(piece, [AROUND, 160 + 2 * row + column], [])
        _add_text(piece, [NEWLINE])
    if rows * columns > 1:
        _add(piece, [NEWLINE, AROUND, GLOBAL], [AROUND])
    tiles = piece.ids.count(IMAGE) // TILE_TOKENS
    pixels = torch.zeros(1, MOST_TILES, 3, TILE, TILE)
    pixels[:, :tiles] = torch.randn(tiles, 3, TILE, TILE, generator=generator)
    piece.tensors = {"pixel_values": pixels, "pixel_attention_mask": (torch.arange(MOST_TILES) < tiles)[None]}
    return piece


def _add(piece: Piece, before: list[int], behind: list[int]) -> None:
    """A tile's tokens between others."""
    _add_text(piece, before)
    piece.ids += [IMAGE] * TILE_TOKENS
    piece.types += [1] * TILE_TOKENS
    _add_text(piece, behind)


def _add_text(piece: Piece, ids: list[int]) -> None:
    piece.ids += ids
    piece.types += [0] * len(ids)


def rows_of_tiles(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The tiles of each row of the batch together, padded to the most of any row."""
    inputs = without_types(model, inputs)
    if "pixel_values" not in inputs:
        return inputs
    counts = (inputs["input_ids"] == IMAGE).sum(1) // TILE_TOKENS
    mask = torch.arange(int(counts.max())) < counts[:, None]
    pixels = torch.zeros(*mask.shape, 3, TILE, TILE)
    pixels[mask] = inputs["pixel_values"][inputs["pixel_attention_mask"]]
    return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask}


MEMBERS = [
    Member("granite_docling", build_granite_docling, tiles_image, finish=rows_of_tiles),
    Member(
        "cohere_compass",
        build_cohere_compass,
        partial(image, patch=PATCH),
        partial(frames_video, patch=PATCH),
    ),
]
