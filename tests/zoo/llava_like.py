"""A vision tower, a projector, and a text model with one-dimensional RoPE: LLaVA and those made after it."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from zoo.pieces import Member, Piece, without_types
from zoo.vision import FRAMES, IMAGE, SIDE, TOWER, VIDEO, clip, noise, square
from zoo.weights import TEXT, drawn

PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = ((28, 56), (40, 56), (56, 20))  # of the first, second, third image: 2, 4 (unpadded) and 2 crops beside the base


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
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT | {"num_key_value_heads": 4}),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return drawn(lambda: LlavaForConditionalGeneration(config), seed)


def llava_next(seed: int) -> PreTrainedModel:
    """LLaVA-NeXT: images of several crops."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return drawn(lambda: LlavaNextForConditionalGeneration(config), seed)


def llava_next_video(seed: int) -> PreTrainedModel:
    """LLaVA-NeXT-Video: frames are pooled to 2 x 2 tokens."""
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return drawn(lambda: LlavaNextVideoForConditionalGeneration(config), seed)


def llava_onevision(seed: int) -> PreTrainedModel:
    """LLaVA-OneVision: SigLIP and Qwen2; a newline ends a video of 2 x 2 tokens a frame."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return drawn(lambda: LlavaOnevisionForConditionalGeneration(config), seed)


def vipllava(seed: int) -> PreTrainedModel:
    """VipLLaVA: the features of several layers of the tower side by side."""
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT | {"num_key_value_heads": 4}),
        image_token_index=IMAGE,
        vision_feature_layer=(-1, -2),
        image_seq_length=16,
    )
    return drawn(lambda: VipLlavaForConditionalGeneration(config), seed)


def video_llava(seed: int) -> PreTrainedModel:
    """Video-LLaVA: a tower each for images and videos; a frame keeps its class token."""
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT | {"num_key_value_heads": 4}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
    )
    return drawn(lambda: VideoLlavaForConditionalGeneration(config), seed)


def fast_vlm(seed: int) -> PreTrainedModel:
    """FastVLM: a convolutional tower (its own needs timm; ConvNeXt has the same kind of output)."""
    tower = ConvNextConfig(
        num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4, image_size=32, hidden_size=32
    )
    config = FastVlmConfig(
        vision_config=tower, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE, image_seq_length=16
    )
    model = drawn(lambda: FastVlmForConditionalGeneration(config), seed)
    model.model.vision_tower._supports_sdpa = True  # says the wrapper of timm, whose place it takes
    return model


MEMBERS = [
    Member("llava", llava, square(SIDE, 16), finish=without_types),
    Member("llava_next", llava_next, crops_image, finish=without_types),
    Member("llava_next_video", llava_next_video, crops_image, clip(SIDE, 4 * FRAMES), without_types),
    Member("llava_onevision", llava_onevision, crops_image, clip(SIDE, 4 * FRAMES + 1), without_types),
    Member("vipllava", vipllava, square(SIDE, 16), finish=without_types),
    Member("video_llava", video_llava, square(SIDE, 16), clip(SIDE, 17 * FRAMES), without_types),
    Member("fast_vlm", fast_vlm, square(32, 16), finish=without_types),
]
