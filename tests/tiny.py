"""Tiny random LLaVA models whose scores are well separated, and batches for them that are built from short specs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

transformers.logging.set_verbosity_error()

VOCABULARY = 200
IMAGE_TOKEN = 199
CROP = 28  # pixels on a side of what the vision tower sees
NEXT_SIZES = (
    (28, 56),
    (40, 56),
    (56, 20),
)  # of the first, second, third image: 1 x 2, 2 x 2 (unpadded) and 2 x 1 crops

FAMILIES = ("llava", "llava-gqa", "llava-mistral", "llava-qwen2", "llava-qwen3", "next")
IMPLEMENTATIONS = ("sdpa", "eager")

_TEXT_CONFIGS: dict[str, tuple[type, int]] = {
    "llava": (LlamaConfig, 4),
    "llava-gqa": (LlamaConfig, 2),
    "llava-mistral": (MistralConfig, 2),
    "llava-qwen2": (Qwen2Config, 2),
    "llava-qwen3": (Qwen3Config, 2),
    "next": (LlamaConfig, 2),
}


class Answer(int):
    """A segment of so many text tokens that are supervised (their labels are not -100)."""


@dataclass
class Row:
    """One sample before padding: token ids, labels, and its images in order."""

    ids: list[int]
    labels: list[int]
    pixels: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


def text_config(family: str, layers: int = 8, **changes: Any) -> Any:
    """The configuration of the family's text model: GQA where it has fewer key heads, no sliding window."""
    config_class, key_heads = _TEXT_CONFIGS[family]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if config_class is MistralConfig:
        values["sliding_window"] = None
    if config_class is Qwen3Config:
        values["head_dim"] = 24  # not hidden_size / heads, as in the published models
    return config_class(**(values | changes))


def tiny_model(
    family: str = "llava", attention: str = "sdpa", layers: int = 8, seed: int = 0, **text_changes: Any
) -> PreTrainedModel:
    """A random fp32 model in eval mode; every matrix is drawn from N(0, 0.12), so that no two scores nearly tie."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=CROP,
        patch_size=CROP // 4,
        projection_dim=32,
    )
    shared: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text_config(family, layers, **text_changes),
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    model: PreTrainedModel
    if family == "next":
        pinpoints = [[CROP, 2 * CROP], [2 * CROP, CROP], [2 * CROP, 2 * CROP]]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(image_seq_length=16, **shared))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        for module in model.modules():
            for name in ("q_norm", "k_norm"):
                if hasattr(module, name):
                    getattr(module, name).weight.uniform_(0.5, 1.5)
        model.get_output_embeddings().weight[IMAGE_TOKEN:] = 0  # never the likeliest token: no image id is generated
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def text_model(model: PreTrainedModel) -> Any:
    """The decoder stack inside the model."""
    return model.model.language_model


def image_tokens(model: PreTrainedModel, pixels: Tensor, size: tuple[int, int]) -> int:
    """How many rows the model itself makes of an image."""
    arguments: dict[str, Any] = {"pixel_values": pixels[None], "return_dict": True}
    if pixels.dim() == 4:
        arguments["image_sizes"] = torch.tensor([size])
    with torch.no_grad():
        return len(torch.cat(list(model.get_image_features(**arguments).pooler_output)))


def make_rows(model: PreTrainedModel, specs: list[list[Any]], seed: int = 1) -> list[Row]:
    """Rows of random content. A spec lists segments: 5 is five text tokens, Answer(5) supervised ones, "image" one.

    The tokens of a row depend on the seed and the row's own number alone, so a shorter spec list gives the same rows.
    """
    return [_make_row(model, spec, seed * 1000 + number) for number, spec in enumerate(specs)]


def _make_row(model: PreTrainedModel, spec: list[Any], seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    row = Row([], [])
    for segment in spec:
        if segment == "image":
            size = NEXT_SIZES[len(row.pixels) % len(NEXT_SIZES)]
            pixels = torch.randn(_pixel_shape(model, size), generator=generator)
            count = image_tokens(model, pixels, size)
            row.pixels.append(pixels)
            row.sizes.append(size)
            row.ids += [IMAGE_TOKEN] * count
            row.labels += [-100] * count
        else:
            tokens = torch.randint(2, VOCABULARY - 10, (int(segment),), generator=generator).tolist()
            row.ids += tokens
            row.labels += tokens if isinstance(segment, Answer) else [-100] * int(segment)
    return row


def _pixel_shape(model: PreTrainedModel, size: tuple[int, int]) -> tuple[int, ...]:
    if model.config.model_type != "llava_next":
        return (3, CROP, CROP)
    crops = 1 + -(-size[0] // CROP) * -(-size[1] // CROP)
    return (crops, 3, CROP, CROP)


def collate(rows: list[Row], side: str = "left", labels: bool = False, width: int = 0) -> dict[str, Tensor]:
    """The model's inputs: rows padded on one side to the longest (or to `width`), their images one after the other."""
    width = max([width, *(len(row.ids) for row in rows)])
    inputs = {
        "input_ids": torch.tensor([_pad(row.ids, width, 0, side) for row in rows]),
        "attention_mask": torch.tensor([_pad([1] * len(row.ids), width, 0, side) for row in rows]),
    }
    if labels:
        inputs["labels"] = torch.tensor([_pad(row.labels, width, -100, side) for row in rows])
    pixels = [image for row in rows for image in row.pixels]
    if pixels and pixels[0].dim() == 3:
        inputs["pixel_values"] = torch.stack(pixels)
    elif pixels:
        crops = max(len(image) for image in pixels)
        inputs["pixel_values"] = torch.stack([_pad_crops(image, crops) for image in pixels])
        inputs["image_sizes"] = torch.tensor([size for row in rows for size in row.sizes])
    return inputs


def _pad(values: list[int], width: int, filler: int, side: str) -> list[int]:
    padding = [filler] * (width - len(values))
    return padding + values if side == "left" else values + padding


def _pad_crops(image: Tensor, crops: int) -> Tensor:
    return torch.cat([image, image.new_zeros(crops - len(image), *image.shape[1:])])


def make_batch(
    model: PreTrainedModel, specs: list[list[Any]], side: str = "left", seed: int = 1, labels: bool = False
) -> dict[str, Tensor]:
    """`collate(make_rows(...))`."""
    return collate(make_rows(model, specs, seed), side, labels)
