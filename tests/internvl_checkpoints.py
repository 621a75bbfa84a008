"""Tiny random InternVL checkpoints on disk, in Transformers' format and in that of its authors, with a processor:
pictures are cut into tiles of 4 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY, WORDS = 200, 180
MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "image_token": "<image>",  # where a picture stands in a prompt of the authors' format
}
STOP = WORDS + len(MARKS)
IMAGE = WORDS + list(MARKS).index("context_image_token")
PICTURE, FILM = MARKS["context_image_token"], MARKS["video_token"]
TILE = 28  # pixels on a side: 4 x 4 patches, shuffled 2 x 2 into a token
MOST_TILES = 6
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TEXTS = {
    "internvl-qwen2": (Qwen2Config, {}),
    "internvl-qwen3": (Qwen3Config, {}),
    "internvl-qwen3-moe": (Qwen3MoeConfig, EXPERTS),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the authors' code
# What a checkpoint in the authors' format brings with it, for its configuration is none of Transformers'.
CHAT_CONFIG = """
from transformers import AutoConfig, PretrainedConfig


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **others):
        super().__init__(**others)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = AutoConfig.for_model(**(llm_config or {"model_type": "qwen2"}))
"""
# Transformers' names of the weights, and the authors'.
CHAT_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.vision_tower.": "vision_model.",
    "cls_token": "class_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "position_embeddings": "position_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.q_proj": "attn.qkv",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}


def save_internvl(folder: Path, family: str = "internvl-qwen2") -> Path:
    """A tiny random checkpoint on the text model of `family`, with its processor."""
    _model(family).save_pretrained(folder)
    size: Any = {"height": TILE, "width": TILE}
    pixels: dict[str, Any] = {"size": size, "image_mean": MEAN, "image_std": STD}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(crop_to_patches=True, max_patches=MOST_TILES, **pixels),
        tokenizer=_tokenizer(),
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=4,
    ).save_pretrained(folder)
    return folder


def save_internvl_chat(folder: Path, family: str = "internvl-qwen2") -> Path:
    """The checkpoint of `save_internvl`, in the authors' format."""
    folder.mkdir(exist_ok=True)
    model = _model(family)
    _tokenizer().save_pretrained(folder)
    save_file(_chat_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "configuration_internvl_chat.py").write_text(CHAT_CONFIG)
    (folder / "config.json").write_text(json.dumps(_chat_config(model)))
    return folder


def _chat_weights(model: Any) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    found = {}
    for name, value in weights.items():
        if ".vision_tower." in name and (".k_proj." in name or ".v_proj." in name):
            continue  # part of qkv
        if ".vision_tower." in name and ".q_proj." in name:
            value = torch.cat([weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        for ours, theirs in CHAT_NAMES.items():
            if ours.startswith(("model.", "lm_head")) == name.startswith(ours):
                name = name.replace(ours, theirs, 1)
        found[name] = value.contiguous()
    return found


def _chat_config(model: Any) -> dict[str, Any]:
    vision = model.config.vision_config
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": TILE,
            "patch_size": TILE // 4,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": vision.hidden_act,
            "initializer_factor": 0.1,
            "norm_type": vision.norm_type,
            "qk_normalization": False,
            "qkv_bias": False,
        },
        "llm_config": model.config.text_config.to_dict(),
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": TILE,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": MOST_TILES,
        "dtype": "float32",
    }


def _model(family: str) -> InternVLForConditionalGeneration:
    text, settings = TEXTS[family]
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=TILE // 4,
        ),
        text_config=text(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            pad_token_id=STOP,
            eos_token_id=None,
            **settings,
        ),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        model.get_output_embeddings().weight[WORDS:] = 0  # no special token is ever the likeliest
    model.generation_config.eos_token_id = None
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(WORDS)}
    vocabulary |= {mark: number for number, mark in enumerate([*MARKS.values(), "<stop>"], WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<stop>",
        pad_token="<stop>",
        unk_token="w0",
        extra_special_tokens=MARKS,
        padding_side="left",
    )
