"""What cannot be seen in a model itself: one record for each family, and its limits in words."""

from __future__ import annotations

from dataclasses import dataclass

from pyramiddrop.hf.images import (
    ImageLengths,
    anyres_lengths,
    end_behind,
    equal_lengths,
    molmo_lengths,
    one_between,
    pixtral_lengths,
    pooled_lengths,
    step_lengths,
    tile_first,
    tile_lengths,
    whole_last,
)


@dataclass(frozen=True)
class Limit:
    """What does not go on a family, or goes otherwise.

    Attributes:
        name: for a table.
        says: in a sentence.
    """

    name: str
    says: str


@dataclass(frozen=True)
class Family:
    """One entry. An entry that is not refused is proven by the conformance suite on a tiny random model.

    Attributes:
        text: model types of the text models that are proven.
        modalities: what it sees.
        limits: what a user should know.
        image_lengths: tokens of each image of a call, in order, or None where its grids alone may tell (where there are
            none, a run of visual tokens is one image).
        split: what stands between the tokens of one image, so that a run of them is no image; empty where none does.
        refused: why staged dropping cannot work on the family.
    """

    text: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ("image",)
    limits: tuple[Limit, ...] = ()
    image_lengths: ImageLengths | None = None
    split: str = ""
    refused: str = ""


VIDEO = ("image", "video")

AXES = Limit("no compact", 'positions="compact" is refused: positions have several axes (M-RoPE)')
OWN_ROPE = Limit("no compact", 'positions="compact" is refused: the layers do not share one rotary embedding')
DYNAMIC_ROPE = Limit("no compact", 'positions="compact" is refused: the frequencies of RoPE depend on the length')
WINDOWS = Limit(
    "windows",
    "default stages move to layers that see everything; a layer with a window ranks only where it reaches every visual "
    "token, else the call is refused. Flash attention is refused where such layers follow a drop",
)
CHUNKS = Limit(
    "chunks",
    "default stages move to layers that see everything; a layer with chunks ranks only prompts of one chunk. Flash "
    "attention is refused where such layers follow a drop",
)
ALL_WINDOWED = Limit(
    "windows",
    "on a text model with sliding windows in every layer (Mistral 0.1), a prompt whose visual tokens are out of the "
    "ranking layer's reach is refused, and flash attention is",
)
STATIC = Limit("no static cache", "a StaticCache is refused where a layer with a window follows a drop")
TWO_WAY = Limit(
    "further images",
    "a further image on top of a pruned cache is refused where tokens are dropped before the first layer of a kind: "
    "give the whole conversation",
)
RECURRENT = Limit(
    "recurrent layers",
    "only layers with attention rank, and default stages move there; later recurrent layers run over the rows that are "
    "left",
)
SHARED = Limit(
    "shared keys", "smaller checkpoints: no drop before the last layers, which reuse an earlier layer's keys"
)
FLOOR = Limit(
    "long prompts", "a prompt that reaches attn floor_scale (8192 tokens as published) with its answer is refused"
)
FRAMES = Limit("no per_frame", "per_frame=True is refused, for frames of a video are images here; use per_image=True")
BROKEN = Limit("Transformers 5.24.0", "Transformers 5.24.0 cannot run it, with a method or without; use 5.23")
ADJACENT = Limit(
    "adjacent images", "images side by side, without a token of text between them, count as one under per_image=True"
)
CROPS = Limit("crops", "with pan and scan on, each crop counts as an image under per_image=True")

TILES = "tokens that name its tiles"
_NAMED_LAST, _NAMED_FIRST = tile_lengths(whole_last), tile_lengths(tile_first)
_ENDED, _BROKEN = tile_lengths(end_behind), tile_lengths(one_between)

_LLAVA = Family(("llama",), image_lengths=equal_lengths)
_QWEN = (AXES,)
_GEMMA = (OWN_ROPE, WINDOWS, STATIC)


def _unknown(layer_type: str) -> str:
    return f"layers of type {layer_type!r} are not known"


_ENCODER_DECODER = "it is an encoder-decoder: its visual tokens do not pass through the decoder"
_CROSS = "its text model looks at the image by cross-attention; no visual token is in the text"
_QUERIES = "a Q-Former has made a few queries of each image, and its text models (OPT, T5) are not of the common form"

_PLACED = "its visual tokens have no id of their own in the text; image_embeds_position_mask tells where they are"

FAMILIES: dict[str, Family] = {
    # ---- LLaVA and its kin
    "llava": _LLAVA,
    "llava_next": Family(("llama",), image_lengths=anyres_lengths),
    "llava_next_video": Family(("llama",), VIDEO, (ADJACENT,)),
    "llava_onevision": Family(("qwen2",), VIDEO, (ADJACENT,)),
    "vipllava": _LLAVA,
    "video_llava": Family(("llama",), VIDEO, (ADJACENT,)),
    "fast_vlm": Family(("qwen2",), image_lengths=equal_lengths),
    "perception_lm": Family(("llama",), VIDEO, (ADJACENT,)),
    "deepseek_vl": _LLAVA,
    "janus": _LLAVA,
    "granite4_vision": Family(("granite4_vision_text",), limits=(ADJACENT,)),
    # ---- Qwen
    "qwen2_vl": Family(("qwen2_vl_text",), VIDEO, (AXES,)),
    "qwen2_5_vl": Family(("qwen2_5_vl_text",), VIDEO, (AXES,)),
    "qwen3_vl": Family(("qwen3_vl_text",), VIDEO, _QWEN),
    "qwen3_vl_moe": Family(("qwen3_vl_moe_text",), VIDEO, _QWEN),
    "qwen2_5_omni_thinker": Family(("qwen2_5_omni_text",), VIDEO, (AXES,)),
    "qwen3_omni_moe_thinker": Family(("qwen3_omni_moe_text",), VIDEO, (AXES,)),
    "qwen3_5": Family(("qwen3_5_text",), VIDEO, (AXES, RECURRENT)),
    "qwen3_5_moe": Family(("qwen3_5_moe_text",), VIDEO, (AXES, RECURRENT)),
    "qwen4_exp": Family(("qwen4_exp_text",), VIDEO, refused=_unknown("indexed_attention")),
    "video_llama_3": Family(("qwen2",), VIDEO, (ADJACENT,)),
    "cosmos3_edge": Family(("cosmos3_edge_text",), VIDEO, _QWEN),
    "cosmos3_omni": Family(("qwen3_vl_text",), VIDEO, _QWEN),
    # ---- images in tiles or rows
    "internvl": Family(("qwen2",), VIDEO, (FRAMES,)),
    "qianfan_ocr": Family(("qwen3",)),
    "idefics2": Family(("mistral",), ("image",), (ADJACENT, ALL_WINDOWED), _BROKEN, "tokens around each part"),
    "idefics3": Family(("llama",), image_lengths=_NAMED_LAST, split=TILES),
    "smolvlm": Family(("llama",), VIDEO, (FRAMES,), _NAMED_LAST, TILES),
    "granite_docling": Family(("granite_docling_text",), image_lengths=_NAMED_FIRST, split=TILES),
    "mistral3": Family(("mistral", "mistral4"), image_lengths=pixtral_lengths, split="breaks of rows"),
    "lighton_ocr": Family(("qwen3",), image_lengths=pixtral_lengths),
    "aya_vision": Family(("cohere2",), ("image",), (WINDOWS, STATIC), _ENDED, TILES),
    "cohere2_vision": Family(("cohere2",), ("image",), (WINDOWS, STATIC), _BROKEN, "breaks of tiles"),
    "cohere_compass": Family(("cohere_compass_text",), VIDEO, (OWN_ROPE, WINDOWS, STATIC)),
    "llama4": Family(("llama4_text",), ("image",), (CHUNKS, FLOOR, BROKEN), _ENDED, "separators of tiles"),
    "molmo2": Family(("molmo2_text",), VIDEO, (FRAMES,), molmo_lengths, "columns' ends"),
    "step3p7": Family(("step3p5",), limits=_GEMMA, image_lengths=step_lengths, split="tokens around each view"),
    "ovis2": Family(("qwen2",), image_lengths=_BROKEN, split="indicators of tiles"),
    "got_ocr2": Family(("qwen2",)),
    "aria": Family(("aria_text",), image_lengths=equal_lengths),
    "phi4_multimodal": Family(("phi4_multimodal",), limits=(ADJACENT,)),
    "fuyu": Family(("persimmon",), image_lengths=_BROKEN, split="a newline behind each row"),
    # ---- Gemma
    "paligemma": Family(("gemma", "gemma2"), limits=(WINDOWS, STATIC), image_lengths=equal_lengths),
    "gemma3": Family(("gemma3_text",), limits=(*_GEMMA, TWO_WAY, CROPS), image_lengths=equal_lengths),
    "gemma3n": Family(("gemma3n_text",), limits=(*_GEMMA, SHARED), image_lengths=equal_lengths),
    "gemma4": Family(("gemma4_text",), VIDEO, (*_GEMMA, TWO_WAY, SHARED), pooled_lengths),
    "gemma4_unified": Family(("gemma4_unified_text",), VIDEO, (*_GEMMA, TWO_WAY), pooled_lengths),
    # ---- GLM and others with positions of several axes
    "glm4v": Family(("glm4v_text",), VIDEO, (AXES,)),
    "glm4v_moe": Family(("glm4v_moe_text",), VIDEO, (AXES,)),
    "glm46v": Family(("glm4v_text",), VIDEO, (AXES,)),
    "glmga": Family(("glm4v_text",), VIDEO, (AXES,)),
    "glm_ocr": Family(("glm_ocr_text",), VIDEO, (AXES,)),
    "paddleocr_vl": Family(("paddleocr_vl_text",), limits=(AXES,)),
    "ernie4_5_vl_moe": Family(("ernie4_5_vl_moe_text",), VIDEO, (AXES,)),
    "hunyuan_vl": Family(("hunyuan_vl_text",), limits=(DYNAMIC_ROPE,)),
    "exaone4_5": Family(("exaone4",), VIDEO, (WINDOWS, STATIC)),
    "hyperclovax_vision_v2": Family(("hyperclovax",), VIDEO),
    "muse_glimmer": Family(("muse_glimmer_text",), VIDEO, (WINDOWS, STATIC)),
    # ---- latent attention
    "kimi_k25": Family(("deepseek_v3",), VIDEO),
    "deepseek_ocr2": Family(("deepseek_ocr2_text",), limits=(ADJACENT,)),
    "mistral_large4": Family(("mistral_large4_text",), refused=_unknown("indexed_attention")),
    "minimax_m3_vl": Family(("minimax_m3_vl_text",), VIDEO, refused=_unknown("minimax_m3_sparse")),
    "unlimited_ocr": Family(("unlimited_ocr_text",), refused=_unknown("reference_sliding_attention")),
    # ---- convolutions and linear attention
    "lfm2_vl": Family(("lfm2",), ("image",), (RECURRENT,), _ENDED, TILES),
    "lfm3_vl": Family(("lfm3",), VIDEO, (OWN_ROPE, RECURRENT, WINDOWS)),
    "nemotron_h_omni": Family(("nemotron_h",), refused="it has no decoder with `layers` and `embed_tokens`"),
    # ---- images as tokens of the vocabulary
    "chameleon": Family(("chameleon",), image_lengths=equal_lengths),
    "emu3": Family(("emu3_text_model",)),
    # ---- no visual token passes through a decoder of the common form
    "mllama": Family(("mllama_text_model",), refused=_CROSS),
    "idefics": Family(("idefics",), refused=_CROSS),
    "blip-2": Family(("opt", "t5"), refused=_QUERIES),
    "instructblip": Family(("llama", "t5"), refused=_QUERIES),
    "instructblipvideo": Family(("llama", "t5"), ("video",), refused=_QUERIES),
    "florence2": Family(("bart",), refused=_ENCODER_DECODER),
    "pix2struct": Family(("pix2struct_text_model",), refused=_ENCODER_DECODER),
    "udop": Family(("udop",), refused=_ENCODER_DECODER),
    "kosmos-2": Family(
        ("kosmos_2_text_model",),
        refused=_PLACED,
    ),
    "git": Family(
        ("git",), refused="its image features are put before the text inside the model, without placeholders"
    ),
    "kosmos-2.5": Family(
        ("kosmos_2_5_text_model",),
        refused=_PLACED,
    ),
    "evolla": Family(("evolla",), ("protein",), refused="it looks at proteins, by cross-attention"),
    "diffusion_gemma": Family(
        ("diffusion_gemma_text",), refused="it writes blocks by diffusion, and no last token of a prompt asks"
    ),
    "blip": Family(("blip_text_model",), refused=_CROSS),
    "pi0": Family(("gemma",), refused="it predicts actions, by two decoders that look at each other"),
    "pp_formulanet": Family(("pp_formulanet_text",), refused=_ENCODER_DECODER),
    "t5gemma2": Family(("t5gemma2_decoder",), refused=_ENCODER_DECODER),
    "vision-encoder-decoder": Family(("any",), refused=_ENCODER_DECODER),
    "dots3_note": Family(("dots3_note_text",), refused=_unknown("indexed_attention")),
    "glm5_next": Family(("glm5_next_text",), refused=_unknown("indexed_attention")),
    "inkling_mm_model": Family(("inkling_text",), refused=_unknown("hybrid")),
    "inkling2": Family(("inkling2_text",), refused=_unknown("hybrid")),
    "inkling2_loop": Family(("inkling2_loop_text",), refused=_unknown("hybrid")),
    "hy_v4_vl": Family(("hy_v4_vl_text",), VIDEO, refused=_unknown("indexed_attention")),
}
