"""Owns how the sizes for the cost model are read from a Transformers configuration; no weights are needed."""

from __future__ import annotations

from typing import Any

from pyramiddrop.cost import DecoderShape, Experts, ModelShape, VisionShape

#: Text models made of grouped-query attention and gated MLPs, dense or mixtures of experts. A layer with a window is
#: counted like one without.
TEXT_MODELS = (
    "chameleon",
    "cohere2",
    "cohere_compass_text",
    "emu3_text_model",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4v_text",
    "glm_ocr_text",
    "granite4_vision_text",
    "granite_docling_text",
    "hunyuan_vl_text",
    "hyperclovax",
    "llama",
    "mistral",
    "mixtral",
    "molmo2_text",
    "paddleocr_vl_text",
    "phi4_multimodal",
    "qwen2",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_moe",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
)
LLAVA_FAMILIES = ("llava", "llava_next")
QWEN_TOWERS = ("qwen2_vl_vision", "qwen2_5_vl_vision")


def model_shape(config: Any, bytes_per_value: int | None = None) -> ModelShape:
    """The sizes of the model that `config` describes.

    The vision tower is read for LLaVA and LLaVA-NeXT with CLIP, for Qwen2-VL, Qwen2.5-VL and InternVL; of others it is
    None.

    Args:
        config: of a vision-language model or of a text model.
        bytes_per_value: of the KV cache; None takes the checkpoint's dtype, or 2 where it names none.

    Raises:
        ValueError: for a text model that the cost model does not know.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"the cost model does not know the text model {text.model_type!r}; it knows {', '.join(TEXT_MODELS)}"
        )
    if bytes_per_value is None:
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
        bytes_per_value = dtype.itemsize if dtype is not None else 2
    return ModelShape(decoder_shape(text, bytes_per_value), _vision_shape(config))


def decoder_shape(text: Any, bytes_per_value: int) -> DecoderShape:
    """The sizes of the decoder of a text model's configuration."""
    heads = text.num_attention_heads
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        bytes_per_value=bytes_per_value,
        vocabulary=text.vocab_size,
        experts=_experts(text),
    )


def visual_tokens_of(config: Any) -> int | None:
    """The visual tokens of one picture where every picture has the same number, or None."""
    vision = _vision_shape(config) if config.model_type == "llava" else None
    return vision.crop_tokens if vision else None


def _experts(text: Any) -> Experts | None:
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if not count:
        return None
    step, dense = getattr(text, "decoder_sparse_step", 1), set(getattr(text, "mlp_only_layers", None) or [])
    return Experts(
        count=count,
        active=text.num_experts_per_tok,
        intermediate=getattr(text, "moe_intermediate_size", None) or text.intermediate_size,
        shared=getattr(text, "shared_expert_intermediate_size", 0),
        layers=tuple(
            layer for layer in range(text.num_hidden_layers) if layer not in dense and (layer + 1) % step == 0
        ),
    )


def _vision_shape(config: Any) -> VisionShape | None:
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    if config.model_type in LLAVA_FAMILIES and vision.model_type == "clip_vision_model":
        return _clip_shape(config, vision)
    if vision.model_type == "internvl_vision":
        return _intern_shape(config, vision)
    return _qwen_shape(vision) if vision.model_type in QWEN_TOWERS else None


def _clip_shape(config: Any, vision: Any) -> VisionShape:
    layers = config.vision_feature_layer
    width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    hidden = config.get_text_config(decoder=True).hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    class_token = config.vision_feature_select_strategy == "full"
    return VisionShape(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patch_values=vision.num_channels * vision.patch_size**2,
        projector=((width, hidden), (hidden, hidden)),
        crop_tokens=patches + class_token,
        extra_rows=1 - class_token,
    )


def _intern_shape(config: Any, vision: Any) -> VisionShape:
    hidden = config.get_text_config(decoder=True).hidden_size
    height, width = vision.patch_size
    patches = (vision.image_size[0] // height) * (vision.image_size[1] // width)
    merged = round(config.downsample_ratio**-2)
    return VisionShape(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patch_values=vision.num_channels * height * width,
        projector=((merged * vision.hidden_size, hidden), (hidden, hidden)),
        crop_tokens=patches // merged,
        rows_per_token=merged,
        extra_rows=1,
    )


def _qwen_shape(vision: Any) -> VisionShape:
    gated = vision.model_type == "qwen2_5_vl_vision"
    hidden = vision.hidden_size if gated else vision.embed_dim
    out = vision.out_hidden_size if gated else vision.hidden_size
    merged = vision.spatial_merge_size**2 * hidden
    return VisionShape(
        layers=vision.depth,
        hidden=hidden,
        intermediate=vision.intermediate_size if gated else int(hidden * vision.mlp_ratio),
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        projector=((merged, merged), (merged, out)),
        rows_per_token=vision.spatial_merge_size**2,
        gated=gated,
        window=(vision.window_size // vision.patch_size) ** 2 if gated else 0,
        full_layers=len(vision.fullatt_block_indexes) if gated else 0,
    )
