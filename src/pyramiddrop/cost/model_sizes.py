"""Read the sizes that the cost model needs (heads, mixers, experts) from a Transformers configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyramiddrop.cost import (
    DecoderShape,
    Experts,
    Mixer,
    ModelShape,
    VisionShape,
    delta_rule,
    grouped_attention,
    latent_attention,
    short_convolution,
)
from pyramiddrop.families import FAMILIES, Family

#: Text models whose layer types and MLPs are known: those of the tested families, and close relatives.
TEXT_MODELS = {
    *(text for family in FAMILIES.values() if not family.refused for text in family.text),
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
}
#: Text models whose MLPs have no gate.
PLAIN_MLPS = ("apertus1p5_text", "cosmos3_edge_text", "persimmon")
LLAVA_FAMILIES = ("llava", "llava_next")
QWEN_TOWERS = ("qwen2_vl_vision", "qwen2_5_vl_vision")


def model_shape(config: Any, bytes_per_value: int | None = None) -> ModelShape:
    """The sizes of the model that `config` describes.

    The vision tower is read for LLaVA and LLaVA-NeXT with CLIP, for Qwen2-VL, Qwen2.5-VL and InternVL; for others it is
    None.

    Args:
        config: configuration of a vision-language model or of a text model.
        bytes_per_value: bytes of a value in the KV cache; None: those of the checkpoint's dtype, or 2 if it names none.

    Raises:
        ValueError: if the family is refused, with the reason, or the cost model does not know the text model.
    """
    if refused := FAMILIES.get(config.model_type, Family()).refused:
        raise ValueError(f"the family {config.model_type!r} is not supported: {refused}")
    text = config.get_text_config(decoder=True)
    if bytes_per_value is None:
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
        bytes_per_value = dtype.itemsize if dtype is not None else 2
    return ModelShape(decoder_shape(text, bytes_per_value), _vision_shape(config))


def decoder_shape(text: Any, bytes_per_value: int) -> DecoderShape:
    """The sizes of the decoder that a text model's configuration describes.

    Raises:
        ValueError: if the cost model does not know the text model.
    """
    if text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"the cost model does not know the layers of the text model {text.model_type!r}; it knows those of every "
            "proven family (pyramiddrop families)"
        )
    heads, kv_heads, head_dim = _heads(text)
    experts, widths = _experts(text), _widths(text)
    shape = DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=max(widths) or (experts.intermediate if experts else 0),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        bytes_per_value=bytes_per_value,
        vocabulary=text.vocab_size,
        experts=experts,
        widths=widths if len(set(widths)) > 1 else (),
        further=_further(text),
        matrices=2 if text.model_type in PLAIN_MLPS else 3,
    )
    mixers = tuple(_mixer(text, index, kind) for index, kind in enumerate(_layer_types(text)))
    return shape if set(mixers) == {shape.plain_mixer} else replace(shape, mixers=mixers)


def visual_tokens_of(config: Any) -> int | None:
    """The number of visual tokens of a picture if it is the same for every picture, else None."""
    field = FAMILIES.get(config.model_type, Family()).picture_tokens
    if field:
        return int(getattr(config, field))
    vision = _vision_shape(config) if config.model_type == "llava" else None
    return vision.crop_tokens if vision else None


def _widths(text: Any) -> tuple[int, ...]:
    """The width of each layer's dense MLP; 0 if all MLPs are experts.

    Gemma 3n names each of them; in Gemma 4, MLPs of layers that reuse keys are twice as wide.
    """
    width: Any = _first(text, "intermediate_size_mlp", "intermediate_size")
    if not isinstance(width, int):
        return tuple(width)
    layers: int = text.num_hidden_layers
    wider: int = _first(text, "num_kv_shared_layers") if _first(text, "use_double_wide_mlp") else 0
    return (width,) * (layers - wider) + (2 * width,) * wider


def _further(text: Any) -> tuple[int, ...]:
    """Weights of each layer beside mixer and MLP, in Gemma 3n and 4.

    Per-layer inputs: two matrices in every layer, and one before the first layer that computes them from the
    embeddings. Gemma 3n's additional residual streams: made before the first layer, corrected in each, joined after
    the last.
    """
    one: int = _first(text, "hidden_size_per_layer_input") * text.hidden_size
    if not one:
        return ()
    layers, streams = text.num_hidden_layers, getattr(text, "altup_num_inputs", 1)
    correcting = streams * (text.hidden_size + streams) if streams > 1 else 0
    weights = [2 * one + correcting] * layers
    projecting = (streams - 1) * text.hidden_size**2
    weights[0] += layers * one + projecting
    weights[-1] += projecting
    return tuple(weights)


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


_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
#: Models whose heads differ between layers: Gemma 4's key heads and their width, Step 3.7's query heads.
UNEVEN = ("gemma4_text", "gemma4_unified_text", "step3p5")
FUSED = ("persimmon", "phi4_multimodal")
#: Models with a gate for each value of the attention output.
GATED = ("muse_glimmer_text", "qwen3_5_text", "qwen3_5_moe_text")


def _heads(text: Any, index: int = 0) -> tuple[int, int, int]:
    """The numbers of query heads and of key and value heads of the 0-based layer, and the width of a head."""
    own = text.per_layer_config[index] if text.model_type in UNEVEN else text
    heads: int = own.num_attention_heads
    return heads, _first(own, "num_key_value_heads") or heads, _first(own, "head_dim") or text.hidden_size // heads


def _layer_types(text: Any) -> list[str]:
    """The layer types as Transformers' caches read them, even if the configuration does not name them."""
    if types := _first(text, "layer_types"):
        return list(types)
    given = (kind for kind, size in _WINDOWS.items() if _first(text, size))
    return [next(given, "full_attention")] * text.num_hidden_layers


def _mixer(text: Any, index: int, kind: str) -> Mixer:
    if kind == "conv":
        return short_convolution(text.hidden_size, text.conv_L_cache)
    if kind == "linear_attention":
        return delta_rule(
            text.hidden_size,
            text.linear_num_key_heads,
            text.linear_num_value_heads,
            text.linear_key_head_dim,
            text.linear_value_head_dim,
            text.linear_conv_kernel_dim,
        )
    if getattr(text, "kv_lora_rank", None):
        return latent_attention(
            text.hidden_size,
            text.num_attention_heads,
            text.q_lora_rank,
            text.kv_lora_rank,
            text.qk_rope_head_dim,
            text.qk_nope_head_dim,
            text.v_head_dim,
        )
    return _attention(text, index, kind)


def _attention(text: Any, index: int, kind: str) -> Mixer:
    heads, kv_heads, width = _heads(text, index)
    # Width of the gate of the attention output; in LFM3 one value for each head.
    gate = heads * width if text.model_type in GATED else heads if _first(text, "use_attention_gate") else 0
    # The last layers of Gemma 3n and 4 attend to the keys of an earlier layer of their type.
    own = text.num_hidden_layers - _first(text, "num_kv_shared_layers")
    source = None if index < own else max(layer for layer in range(own) if text.layer_types[layer] == kind)
    return grouped_attention(
        text.hidden_size,
        heads,
        kv_heads,
        width,
        window=_first(text, _WINDOWS[kind]) if kind in _WINDOWS else 0,
        gate=gate,
        before=_before(text, heads),
        keys_are_values=bool(_first(text, "attention_k_eq_v")) and kind == "full_attention",
        fused=text.model_type in FUSED,
        source=source,
    )


def _before(text: Any, heads: int) -> int:
    """Weights before the attention: Step 3.7's head gates; Gemma 3n's prediction of each residual stream from all of
    them, and its low-rank path beside the attention."""
    hidden: int = text.hidden_size
    if text.model_type == "step3p5":
        return hidden * heads
    streams: int = getattr(text, "altup_num_inputs", 1)
    if streams == 1:
        return 0
    return streams * (hidden + streams**2 + streams * hidden) + 2 * hidden * int(text.laurel_rank)


def _experts(text: Any) -> Experts | None:
    """The experts of a text model, or None if all MLPs are dense."""
    count = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not count or not getattr(text, "enable_moe_block", True):
        return None
    width: Any = _first(text, "moe_intermediate_size", "intermediate_size")
    # ERNIE 4.5 VL has a second width, of the experts of visual tokens.
    width, visual = (width, None) if isinstance(width, int) else width[:2]
    # In Llama 4, Transformers sends every row through every expert, with zeros for most.
    all_run = text.model_type == "llama4_text"
    gated = _first(text, "shared_expert_intermediate_size")
    if all_run or _first(text, "enable_moe_block"):  # Gemma 4 has the dense MLP beside the experts
        shared = text.intermediate_size
    else:
        shared = _first(text, "share_expert_dim") or width * _first(text, "n_shared_experts", "moe_num_shared_experts")
    return Experts(
        count=count,
        active=count if all_run else _first(text, "num_experts_per_tok", "top_k_experts", "moe_topk"),
        intermediate=width,
        shared=gated or shared,
        layers=_expert_layers(text),
        shared_gate=bool(gated),
        visual=visual,
    )


def _expert_layers(text: Any) -> tuple[int, ...]:
    """The 0-based layers that have experts."""
    every = range(text.num_hidden_layers)
    types, chosen = getattr(text, "mlp_layer_types", None), getattr(text, "moe_layers", None)
    if types is not None:
        return tuple(layer for layer in every if types[layer] == "sparse")
    if chosen is not None:
        return tuple(chosen)
    first, dense = _first(text, "first_k_dense_replace"), _first(text, "mlp_only_layers") or ()
    step = getattr(text, "decoder_sparse_step", 1)
    return tuple(layer for layer in every if layer >= first and layer not in dense and (layer + 1) % step == 0)


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that exists and is not empty or 0; 0 if none does."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)
