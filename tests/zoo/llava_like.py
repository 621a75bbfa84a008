"""A vision tower, a projector, and a text model with one-dimensional RoPE: LLaVA and those made after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionTextConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from zoo.pieces import Member, Piece, without_types
from zoo.vision import END, FRAMES, IMAGE, SIDE, START, TOWER, VIDEO, clip, noise, square
from zoo.weights import TEXT, drawn

PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = ((28, 56), (40, 56), (56, 20))  # of the first, second, third image: 2, 4 (unpadded) and 2 crops beside the base

Parts = Callable[[Any], Sequence[torch.Tensor]]  # from what get_image_features returns to the features of each image


def crops_image(
    model: PreTrainedModel, generator: torch.Generator, number: int, parts: Parts = attrgetter("pooler_output")
) -> Piece:
    """An image cut into crops and unpadded; as many placeholders as the model makes features."""
    height, width = SIZES[number % len(SIZES)]
    crops = 1 + -(-height // SIDE) * -(-width // SIDE)
    pixels = torch.zeros(1, 5, 3, SIDE, SIDE)  # a batch is padded to the most crops of any image
    pixels[:, :crops] = noise(generator, 1, crops, 3, SIDE, SIDE)
    tensors = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    with torch.no_grad():
        count = len(torch.cat(list(parts(model.get_image_features(**tensors, return_dict=True)))))
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


def perception_lm(seed: int) -> PreTrainedModel:
    """Perception LM: images as tiles, pooled 2 x 2 (its own tower needs timm; CLIP has the same kind of output)."""
    tower = CLIPVisionConfig(**TOWER | {"image_size": 56}, model_args={"embed_dim": TOWER["hidden_size"]})
    config = PerceptionLMConfig(
        vision_config=tower,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )
    return drawn(lambda: PerceptionLMForConditionalGeneration(config), seed)


def tile_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image of one tile of 16 tokens."""
    return Piece([IMAGE] * 16, [1] * 16, {"pixel_values": noise(generator, 1, 1, 3, 56, 56)})


def deepseek_vl(seed: int) -> PreTrainedModel:
    """DeepSeek-VL: SigLIP and Llama with tied embeddings."""
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )
    return drawn(lambda: DeepseekVLForConditionalGeneration(config), seed)


def janus(seed: int) -> PreTrainedModel:
    """Janus, the half that understands images."""
    tower = JanusVisionConfig(
        **{name: value for name, value in TOWER.items() if name != "intermediate_size"},
        mlp_ratio=2.0,
        projection_dim=64,
        num_image_tokens=16,
    )
    painter = JanusVQVAEConfig(
        num_embeddings=16,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=64,
        image_token_embed_dim=64,
    )
    config = JanusConfig(text_config=LlamaConfig(**TEXT), vision_config=tower, vq_config=painter, image_token_id=IMAGE)
    return drawn(lambda: JanusForConditionalGeneration(config), seed)


def granite4_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """As LLaVA-NeXT's, with 2 x 2 tokens a crop."""
    return crops_image(model, generator, number, lambda features: features.deepstack_features[0][1])


def granite4_vision(seed: int) -> PreTrainedModel:
    """Granite 4 Vision: features are added to the hidden states before each of the first five layers."""
    config = Granite4VisionConfig(
        vision_config=CLIPVisionConfig(**TOWER | {"hidden_size": 64}),
        text_config=Granite4VisionTextConfig(
            **TEXT,
            embedding_multiplier=2.0,
            logits_scaling=1.5,
            residual_multiplier=0.8,
            attention_multiplier=0.2,
        ),
        qformer_config={
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2, 3, 4],
        projector_dropout=0.0,
    )
    return drawn(lambda: Granite4VisionForConditionalGeneration(config), seed)


GRANITE4 = {"image_beams": "beam search gives the beams of a row with two images other images than the row's"}

MEMBERS = [
    Member("llava", llava, square(SIDE, 16), finish=without_types),
    Member("llava_next", llava_next, crops_image, finish=without_types),
    Member("llava_next_video", llava_next_video, crops_image, clip(SIDE, 4 * FRAMES), without_types),
    Member("llava_onevision", llava_onevision, crops_image, clip(SIDE, 4 * FRAMES + 1), without_types),
    Member("vipllava", vipllava, square(SIDE, 16), finish=without_types),
    Member("video_llava", video_llava, square(SIDE, 16), clip(SIDE, 17 * FRAMES), without_types),
    Member("fast_vlm", fast_vlm, square(32, 16), finish=without_types),
    Member("perception_lm", perception_lm, tile_image, clip(56, 16 * FRAMES), without_types),
    Member("deepseek_vl", deepseek_vl, square(SIDE, 16), finish=without_types),
    Member("janus", janus, square(SIDE, 16, (START,), (END,)), finish=without_types),
    Member("granite4_vision", granite4_vision, granite4_image, finish=without_types, cannot=GRANITE4),
]
