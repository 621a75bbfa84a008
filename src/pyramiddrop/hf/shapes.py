"""Read the sizes for the cost model from a Transformers configuration; no weights are needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyramiddrop.cost import DecoderShape, Mixer, ModelShape, VisionShape
from pyramiddrop.hf.experts import experts_of
from pyramiddrop.hf.families import FAMILIES
from pyramiddrop.hf.mixers import heads_of, mixers_of

#: Text models whose layers are of kinds that are known (`hf.mixers`), with MLPs or mixtures of experts.
TEXT_MODELS = (
    "aria_text",
    "chameleon",
    "cohere2",
    "cohere_compass_text",
    "cosmos3_edge_text",
    "deepseek_ocr2_text",
    "deepseek_v3",
    "emu3_text_model",
    "ernie4_5_vl_moe_text",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm4v_moe_text",
    "glm4v_text",
    "glm_ocr_text",
    "granite4_vision_text",
    "granite_docling_text",
    "hunyuan_vl_text",
    "hyperclovax",
    "lfm2",
    "lfm3",
    "llama",
    "llama4_text",
    "mistral",
    "mistral4",
    "mixtral",
    "molmo2_text",
    "muse_glimmer_text",
    "paddleocr_vl_text",
    "persimmon",
    "phi4_multimodal",
    "qwen2",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
    "step3p5",
)
#: Those of them whose MLPs have no gate.
PLAIN_MLPS = ("cosmos3_edge_text", "persimmon")
LLAVA_FAMILIES = ("llava", "llava_next")
QWEN_TOWERS = ("qwen2_vl_vision", "qwen2_5_vl_vision")
#: Families that bring every picture to one size and name its tokens.
EQUAL_PICTURES = {"gemma3": "mm_tokens_per_image", "gemma3n": "vision_soft_tokens_per_image"}


def model_shape(config: Any, bytes_per_value: int | None = None) -> ModelShape:
    """The sizes of the model that `config` describes.

    The vision tower is read for LLaVA and LLaVA-NeXT with CLIP, for Qwen2-VL, Qwen2.5-VL and InternVL; of others it is
    None.

    Args:
        config: of a vision-language model or of a text model.
        bytes_per_value: of the KV cache; None takes the checkpoint's dtype, or 2 where it names none.

    Raises:
        ValueError: for a family that is refused, with the reason; for a text model that the cost model does not know.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and family.refused:
        raise ValueError(f"the family {config.model_type!r} is not supported: {family.refused}")
    text = config.get_text_config(decoder=True)
    if bytes_per_value is None:
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
        bytes_per_value = dtype.itemsize if dtype is not None else 2
    return ModelShape(decoder_shape(text, bytes_per_value), _vision_shape(config))


def decoder_shape(text: Any, bytes_per_value: int) -> DecoderShape:
    """The sizes of the decoder of a text model's configuration.

    Raises:
        ValueError: for a text model that the cost model does not know.
    """
    if text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"the cost model does not know the layers of the text model {text.model_type!r}; it knows those of every "
            "proven family (pyramiddrop families)"
        )
    heads, kv_heads, head_dim = heads_of(text)
    experts, widths = experts_of(text), _widths(text)
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
    return _with_mixers(shape, mixers_of(text))


def visual_tokens_of(config: Any) -> int | None:
    """The visual tokens of one picture where every picture has the same number, or None."""
    if config.model_type in EQUAL_PICTURES:
        return int(getattr(config, EQUAL_PICTURES[config.model_type]))
    vision = _vision_shape(config) if config.model_type == "llava" else None
    return vision.crop_tokens if vision else None


def _with_mixers(shape: DecoderShape, mixers: tuple[Mixer, ...]) -> DecoderShape:
    """`shape` with the mixers of its layers, where not all are those of its heads."""
    return shape if set(mixers) == {shape.plain_mixer} else replace(shape, mixers=mixers)


def _widths(text: Any) -> tuple[int, ...]:
    """The width of each layer's dense MLP. Gemma 3n names each; Gemma 4 has MLPs of twice the width in layers that
    reuse keys; 0 where all MLPs are experts."""
    width: Any = getattr(text, "intermediate_size_mlp", None) or getattr(text, "intermediate_size", None) or 0
    if not isinstance(width, int):
        return tuple(width)
    layers: int = text.num_hidden_layers
    shared: int = getattr(text, "num_kv_shared_layers", None) or 0
    wider = shared if getattr(text, "use_double_wide_mlp", False) else 0
    return (width,) * (layers - wider) + (2 * width,) * wider


def _further(text: Any) -> tuple[int, ...]:
    """The inputs per layer of Gemma 3n and 4: a matrix each way in every layer; before the first one, a matrix makes
    them of the embeddings. Gemma 3n's further streams: made before the first layer, corrected in each, joined after
    the last."""
    width: int = getattr(text, "hidden_size_per_layer_input", None) or 0
    if not width:
        return ()
    layers: int = text.num_hidden_layers
    one: int = width * text.hidden_size
    streams: int = getattr(text, "altup_num_inputs", 1)
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
