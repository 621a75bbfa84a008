"""Models of families that staged dropping does not serve, as small as they go: each is to be refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    PreTrainedModel,
    UdopConfig,
    UdopForConditionalGeneration,
)

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER = SMALL | {"image_size": 16, "patch_size": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def mllama() -> PreTrainedModel:
    """Cross-attention to the image."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2]],
        "max_num_tiles": 2,
    }
    text = SMALL | IDS | {"num_hidden_layers": 4, "num_key_value_heads": 1, "cross_attention_layers": [1, 3]}
    config = MllamaConfig(text_config=text | {"vocab_size": 200}, vision_config=vision, image_token_index=190)
    return MllamaForConditionalGeneration(config)


def idefics() -> PreTrainedModel:
    """Gated cross-attention between the decoder's layers."""
    vision = {"embed_dim": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = IdeficsConfig(**SMALL, **IDS, vocab_size=200, vision_config=vision | {"image_size": 16, "patch_size": 8})
    return IdeficsForVisionText2Text(config)


def _qformer() -> dict[str, Any]:
    return SMALL | {"vocab_size": 40, "encoder_hidden_size": 16}


def blip_2() -> PreTrainedModel:
    """Queries of a fixed number from a Q-Former, before OPT."""
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Blip2Config(
        text_config=text | {"vocab_size": 200, "word_embed_proj_dim": 16},
        vision_config=TOWER,
        qformer_config=_qformer(),
        num_query_tokens=4,
        image_token_index=190,
    )
    return Blip2ForConditionalGeneration(config)


def instructblip() -> PreTrainedModel:
    """A Q-Former before T5, which is an encoder and a decoder."""
    text = {"model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    config = InstructBlipConfig(
        text_config=text | {"vocab_size": 200},
        vision_config=TOWER,
        qformer_config=_qformer(),
        num_query_tokens=4,
        image_token_index=190,
    )
    return InstructBlipForConditionalGeneration(config)


def florence2() -> PreTrainedModel:
    """BART: the image is in the encoder."""
    text = {
        "model_type": "bart",
        "vocab_size": 200,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "projection_dim": 16,
    }
    return Florence2ForConditionalGeneration(
        Florence2Config(text_config=text, vision_config=vision, image_token_id=190)
    )


def kosmos2() -> PreTrainedModel:
    """A decoder of its own form, whose forward finds the image by image_embeds_position_mask."""
    text = {"vocab_size": 200, "embed_dim": 16, "layers": 4, "ffn_dim": 32, "attention_heads": 2}
    config = Kosmos2Config(text_config=text, vision_config=TOWER, latent_query_num=4)
    return Kosmos2ForConditionalGeneration(config)


def git() -> PreTrainedModel:
    """Image features are put before the text inside the model, without placeholders."""
    return GitForCausalLM(GitConfig(**SMALL, **IDS, vocab_size=200, vision_config=TOWER))


def pix2struct() -> PreTrainedModel:
    """An image encoder and a text decoder."""
    sizes = {"hidden_size": 16, "d_kv": 8, "d_ff": 32}
    config = Pix2StructConfig(
        text_config=sizes | {"vocab_size": 200, "num_layers": 2, "num_heads": 2},
        vision_config=sizes | {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_embed_hidden_size": 48},
    )
    return Pix2StructForConditionalGeneration(config)


def udop() -> PreTrainedModel:
    """T5 over text, layout and image."""
    sizes = {"vocab_size": 200, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return UdopForConditionalGeneration(UdopConfig(**sizes, image_size=16, patch_size=8))


UNSUPPORTED: dict[str, Callable[[], PreTrainedModel]] = {
    "mllama": mllama,
    "idefics": idefics,
    "blip-2": blip_2,
    "instructblip": instructblip,
    "florence2": florence2,
    "kosmos-2": kosmos2,
    "git": git,
    "pix2struct": pix2struct,
    "udop": udop,
}
