"""Tiny random checkpoints of Qwen's vision-language families on disk, with a processor each: three-axis positions,
pictures of any size, and (Qwen3-VL) visual features that are added once more after the first layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

VOCABULARY, WORDS = 200, 180
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
START, END, IMAGE, VIDEO, STOP = range(WORDS, WORDS + len(MARKS))
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
FILM = "<|vision_start|><|video_pad|><|vision_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + PICTURE + " {% elif part['type'] == 'video' %}" + FILM + " {% else %}"
    "{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": STOP,
    "eos_token_id": STOP,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}
QWEN3 = TEXT | {"head_dim": 32, "rope_parameters": TEXT["rope_parameters"] | {"mrope_interleaved": True}}
VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen2_vl(patch: int) -> Any:
    vision = VISION | {"patch_size": patch, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=vision, **IDS))


def _qwen2_5_vl(patch: int) -> Any:
    vision = VISION | {
        "patch_size": patch,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **IDS))


def _qwen3_vl(patch: int) -> Any:
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=QWEN3, vision_config=_qwen3_vision(patch), **IDS))


def _qwen3_vl_moe(patch: int) -> Any:
    text = QWEN3 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_qwen3_vision(patch), **IDS)
    return Qwen3VLMoeForConditionalGeneration(config)


def _qwen3_vision(patch: int) -> dict[str, Any]:
    return VISION | {
        "patch_size": patch,
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }


FAMILIES = {
    "qwen2_vl": (_qwen2_vl, Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (_qwen3_vl, Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_vl_moe": (_qwen3_vl_moe, Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def save_qwen(folder: Path, family: str, chat_template: str | None = None, patch: int = 14) -> Path:
    """A tiny random checkpoint of `family`, with its processor; `patch` is the side of a patch in pixels."""
    build, processor, videos = FAMILIES[family]
    torch.manual_seed(0)
    model = build(patch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
        model.get_output_embeddings().weight[WORDS:] = 0  # no special token is ever the likeliest
    model.generation_config.eos_token_id = None
    # A model that was not loaded is saved with its experts as Transformers holds them; the published ones stand across.
    weights = {
        name: value.transpose(1, 2).contiguous() if ".mlp.experts." in name else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights)
    pixels = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 36, "patch_size": patch, "merge_size": 2}
    processor(
        image_processor=Qwen2VLImageProcessorPil(**pixels),
        tokenizer=_tokenizer(),
        video_processor=videos(**pixels),
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(WORDS)} | dict(
        zip(MARKS, range(WORDS, VOCABULARY), strict=False)
    )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="w0",
        additional_special_tokens=list(MARKS[:-1]),
    )
