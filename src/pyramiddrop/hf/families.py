"""What a model is made of: its text model, its visual token ids, and whether staged dropping can work on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pyramiddrop.cost import DecoderShape
from pyramiddrop.hf.anyres import token_count
from pyramiddrop.hf.shapes import decoder_shape


class UnsupportedModelError(ValueError):
    """The model, or a setting of it, cannot work with staged dropping; the message says which and why."""


ImageLengths = Callable[[PretrainedConfig, Mapping[str, Any], int], Sequence[int] | None]


def _encoded_lengths(call: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each image where `generate` has already encoded them (Transformers 5.2x hands them to the forward)."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    return None if encoded is None else [len(features) for features in encoded.pooler_output]


def _equal_lengths(config: PretrainedConfig, call: Mapping[str, Any], visual_tokens: int) -> Sequence[int] | None:
    """Tokens of each image of a model that gives every image the same number."""
    encoded, pixels = _encoded_lengths(call), call.get("pixel_values")
    if encoded is not None or pixels is None or visual_tokens % len(pixels):
        return encoded
    return [visual_tokens // len(pixels)] * len(pixels)


def _anyres_lengths(config: PretrainedConfig, call: Mapping[str, Any], visual_tokens: int) -> Sequence[int] | None:
    """Tokens of each image of LLaVA-NeXT: the base crop, and the unpadded grid with one newline token a row."""
    encoded, sizes = _encoded_lengths(call), call.get("image_sizes")
    if encoded is not None or sizes is None:
        return encoded
    return [_anyres_length(config, int(height), int(width)) for height, width in sizes]


def _anyres_length(config: PretrainedConfig, height: int, width: int) -> int:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tiles_high, tiles_wide = get_anyres_image_grid_shape(
        (height, width), config.image_grid_pinpoints, vision.image_size
    )
    class_token = config.vision_feature_select_strategy == "full"
    return token_count((tiles_high * side, tiles_wide * side), side, height, width, class_token)


@dataclass(frozen=True)
class Family:
    """One entry a model family.

    Attributes:
        token_ids: config attributes that hold the ids of visual tokens; the first that is set of each is used.
        image_lengths: tokens of each image of a call, in order, or None where unknown (then a run of visual tokens
            is one image).
    """

    token_ids: tuple[str, ...] = ()
    image_lengths: ImageLengths | None = None


# Text models stand here too: fed with `inputs_embeds` and a `visual_mask`, any of them is a vision-language model.
FAMILIES: dict[str, Family] = {
    "llava": Family(("image_token_id",), _equal_lengths),
    "llava_next": Family(("image_token_id",), _anyres_lengths),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that the adapter hooks.

    Attributes:
        wrappers: the modules from the model down to the one that holds the text model, outermost first; the first
            that sees input_ids knows most (labels, pixel values).
        generator: the module whose `generate` runs, or None.
        text: the text model; its `layers` are the decoder layers.
        visual_ids: ids of visual tokens in input_ids.
        family: its entry.
        config: of the whole model.
        shape: sizes for the cost model.
    """

    wrappers: tuple[nn.Module, ...]
    generator: nn.Module | None
    text: PreTrainedModel
    visual_ids: tuple[int, ...]
    family: Family
    config: PretrainedConfig
    shape: DecoderShape

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.text.layers
        return layers

    @property
    def attention(self) -> str:
        """Name of the attention implementation that runs now ("sdpa", "eager", "flash_attention_2", ...)."""
        return str(self.text.config._attn_implementation)

    def image_lengths(self, call: Mapping[str, Any], visual_tokens: int) -> Sequence[int] | None:
        """Tokens of each image of a call that has `visual_tokens` in all, or None where the family cannot tell."""
        lengths = self.family.image_lengths
        return lengths(self.config, call, visual_tokens) if lengths else None

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Position embeddings (cos, sin), (B, L, d) each, for `position_ids` (B, L)."""
        with torch.no_grad():
            cos, sin = self.text.rotary_emb(hidden, position_ids=position_ids)
        return cos, sin


def anatomy(model: nn.Module) -> Anatomy:
    """Take `model` apart.

    Raises:
        UnsupportedModelError: where its family, its text model or a setting cannot work.
    """
    core = _core(model)
    config, family = core.config, FAMILIES[core.config.model_type]
    text = _text_model(core)
    _check_text_config(text.config)
    wrappers = tuple(module for module in model.modules() if _contains(module, text))
    return Anatomy(
        wrappers=wrappers,
        generator=next((module for module in reversed(wrappers) if hasattr(type(module), "generate")), None),
        text=text,
        visual_ids=tuple(int(getattr(config, name)) for name in family.token_ids),
        family=family,
        config=config,
        shape=decoder_shape(text.config, text.dtype.itemsize),
    )


def _core(model: nn.Module) -> PreTrainedModel:
    """The outermost Transformers model: `model` itself, or what PEFT, DDP and others have wrapped."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return _supported("model family", module, FAMILIES)
    raise UnsupportedModelError(f"{type(model).__name__} holds no Transformers model")


def _text_model(core: PreTrainedModel) -> PreTrainedModel:
    for module in core.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens"):
            return _supported("text model", module, TEXT_MODELS)
    raise UnsupportedModelError(f"{type(core).__name__} has no decoder with layers and token embeddings")


def _supported(kind: str, module: PreTrainedModel, known: Collection[str]) -> PreTrainedModel:
    name = module.config.model_type
    if name not in known:
        raise UnsupportedModelError(
            f"{kind} {name!r} ({type(module).__name__}) is not supported; supported are {', '.join(known)}"
        )
    return module


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return module is not part and any(inner is part for inner in module.modules())


def _check_text_config(config: PretrainedConfig) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = config.model_type == "mistral" and config.sliding_window is not None
    if layer_types != {"full_attention"} or window:
        raise UnsupportedModelError(f"{config.model_type} with sliding-window layers is not supported")
    if config._attn_implementation == "flex_attention":
        raise UnsupportedModelError("attention implementation 'flex_attention' is not supported; use 'sdpa' or 'eager'")


def check_compact_positions(text: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where renumbered positions would change the rotary frequencies themselves."""
    rope = getattr(text.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f'positions="compact" is undefined for {rope["rope_type"]!r} RoPE, whose frequencies depend on the length; '
            'use positions="original"'
        )
