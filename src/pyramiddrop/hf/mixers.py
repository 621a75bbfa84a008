"""How each layer of a text model mixes its rows, read from its configuration for the cost model."""

from __future__ import annotations

from typing import Any

from pyramiddrop.cost import Mixer, delta_rule, grouped_attention, latent_attention, short_convolution

_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
#: Heads differ from layer to layer: Gemma 4's key heads and their width, Step 3.7's query heads.
UNEVEN = ("gemma4_text", "gemma4_unified_text", "step3p5")
FUSED = ("persimmon", "phi4_multimodal")
#: Attention's output has a gate for each of its numbers.
GATED = ("muse_glimmer_text", "qwen3_5_text", "qwen3_5_moe_text")


def mixers_of(text: Any) -> tuple[Mixer, ...]:
    """Of each decoder layer, by a text model's configuration."""
    return tuple(_mixer(text, index, kind) for index, kind in enumerate(_layer_types(text)))


def heads_of(text: Any, index: int = 0) -> tuple[int, int, int]:
    """How many query heads the 0-based layer has, how many key and value heads, and the width of one head."""
    own = text.per_layer_config[index] if text.model_type in UNEVEN else text
    heads: int = own.num_attention_heads
    width = getattr(own, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(own, "num_key_value_heads", None) or heads, width


def _layer_types(text: Any) -> list[str]:
    """As Transformers' caches read them, also where the configuration does not name the layers' types."""
    types = getattr(text, "layer_types", None)
    if types:
        return list(types)
    given = [kind for kind, size in _WINDOWS.items() if getattr(text, size, None)]
    return [given[0] if given else "full_attention"] * text.num_hidden_layers


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
    window = getattr(text, _WINDOWS[kind], None) if kind in _WINDOWS else None
    heads, kv_heads, width = heads_of(text, index)
    return grouped_attention(
        text.hidden_size,
        heads,
        kv_heads,
        width,
        window=window or 0,
        gate=_gate(text, heads, width),
        before=_before(text, heads),
        keys_are_values=bool(getattr(text, "attention_k_eq_v", False)) and kind == "full_attention",
        fused=text.model_type in FUSED,
        source=_source(text, index, kind),
    )


def _gate(text: Any, heads: int, width: int) -> int:
    """Numbers of a row's gate of attention's output; LFM3 has one for each head."""
    if text.model_type in GATED:
        return heads * width
    return heads if getattr(text, "use_attention_gate", False) else 0


def _before(text: Any, heads: int) -> int:
    """Weights in front of the attention: Step 3.7 makes its heads' gates there; Gemma 3n predicts each of its streams
    of all of them, and adds a detour of low rank around the attention."""
    hidden: int = text.hidden_size
    if text.model_type == "step3p5":
        return hidden * heads
    streams: int = getattr(text, "altup_num_inputs", 1)
    if streams == 1:
        return 0
    return streams * (hidden + streams**2 + streams * hidden) + 2 * hidden * int(text.laurel_rank)


def _source(text: Any, index: int, kind: str) -> int | None:
    """The last of Gemma 3n's and Gemma 4's layers attend to the keys of the last layer of their kind that has some."""
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    return None if index < own else max(layer for layer in range(own) if text.layer_types[layer] == kind)
