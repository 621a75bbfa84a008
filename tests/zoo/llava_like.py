"""A vision tower, a projector, and a text model with one-dimensional RoPE: LLaVA and its many relatives."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from zoo.pieces import Member, Piece, without_types
from zoo.weights import TEXT, drawn

IMAGE, VIDEO = 199, 198
START, END = 197, 196
SIDE = 28  # pixels on a side of what a vision tower sees
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = ((28, 56), (40, 56), (56, 20))  # of the first, second, third image: 2, 4 (unpadded) and 2 crops beside the base
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": SIDE // 4,
}


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Pixels."""
    return torch.randn(shape, generator=generator)


def one_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image of one size: 16 tokens."""
    return Piece([IMAGE] * 16, [1] * 16, {"pixel_values": noise(generator, 1, 3, SIDE, SIDE)})


def crops_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image cut into crops and unpadded; as many placeholders as the model makes features."""
    height, width = SIZES[number % len(SIZES)]
    crops = 1 + -(-height // SIDE) * -(-width // SIDE)
    pixels = torch.zeros(1, 5, 3, SIDE, SIDE)  # a batch is padded to the most crops of any image
    pixels[:, :crops] = noise(generator, 1, crops, 3, SIDE, SIDE)
    tensors = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    with torch.no_grad():
        count = len(torch.cat(list(model.get_image_features(**tensors, return_dict=True).pooler_output)))
    return Piece([IMAGE] * count, [1] * count, tensors)


def llava(seed: int) -> PreTrainedModel:
    """LLaVA-1.5: Llama without GQA."""
    text = LlamaConfig(**TEXT | {"num_key_value_heads": 4})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return drawn(lambda: LlavaForConditionalGeneration(config), seed)


def llava_next(seed: int) -> PreTrainedModel:
    """LLaVA-NeXT: images of several crops."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return drawn(lambda: LlavaNextForConditionalGeneration(config), seed)


MEMBERS = [
    Member("llava", llava, one_image, finish=without_types),
    Member("llava_next", llava_next, crops_image, finish=without_types),
]
