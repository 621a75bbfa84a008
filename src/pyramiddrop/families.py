"""One record for each model family: everything that depends on the family's name, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A restriction of a family: a short name for tables, and one sentence."""

    name: str
    description: str


@dataclass(frozen=True)
class Family:
    """Facts about a model family. Every family that is not refused is tested by the conformance suite.

    Attributes:
        text: tested model types of its text model.
        modalities: the kinds of input it takes.
        limits: restrictions that users should know.
        image_lengths: the rule that finds the tokens of each image of a call, a name in `hf.images.IMAGE_LENGTHS`;
            empty if the grids in the call suffice (without them, a run of visual tokens is one image).
        split: what separates the tokens of one image, so that a run of them is not a whole image; empty if nothing.
        refused: why staged dropping cannot work on the family; empty if it works.
        layout: where the tokens lie in a picture or a frame, a name in `report.token_layout.views.LAYOUTS`; empty if
            it is unknown.
        no_layout: why its tokens have no place in a picture.
        two_way: True if image tokens attend to each other in both directions.
        fixed_patches: True if the visual tokens are the patches of a vision tower of one fixed size.
        picture_tokens: the configuration field with the number of tokens of every picture.
        served: its architectures that the vLLM plug-in serves.
    """

    text: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ("image",)
    limits: tuple[Limit, ...] = ()
    image_lengths: str = ""
    split: str = ""
    refused: str = ""
    layout: str = ""
    no_layout: str = ""
    two_way: bool = False
    fixed_patches: bool = False
    picture_tokens: str = ""
    served: tuple[str, ...] = ()


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
GRIDS = "patch grids in time"
_GEMMA = (OWN_ROPE, WINDOWS, STATIC)

RESAMPLED = "a resampler makes each of its tokens from the whole picture"
QUERIED = "a Q-Former makes each of its tokens from the whole picture"


def _unknown(layer_type: str) -> str:
    return f"layers of type {layer_type!r} are not known"


_ENCODER_DECODER = "it is an encoder-decoder: its visual tokens do not pass through the decoder"
_CROSS = "its text model looks at the image by cross-attention; no visual token is in the text"
_QUERIES = "a Q-Former has made a few queries of each image, and its text models (OPT, T5) are not of the common form"

_PLACED = "its visual tokens have no id of their own in the text; image_embeds_position_mask tells where they are"

FAMILIES: dict[str, Family] = {
    # ---- LLaVA and relatives
    "llava": Family(
        ("llama",), image_lengths="equal", layout="llava", fixed_patches=True, served=("LlavaForConditionalGeneration",)
    ),
    "llava_next": Family(
        ("llama",), image_lengths="anyres", layout="anyres", served=("LlavaNextForConditionalGeneration",)
    ),
    "llava_next_video": Family(("llama",), VIDEO, (ADJACENT,), layout="anyres"),
    "llava_onevision": Family(("qwen2",), VIDEO, (ADJACENT,), layout="onevision"),
    "vipllava": Family(("llama",), image_lengths="equal", layout="calibrated", fixed_patches=True),
    "video_llava": Family(("llama",), VIDEO, (ADJACENT,), layout="one crop"),
    "fast_vlm": Family(("qwen2",), image_lengths="equal", layout="calibrated"),
    "perception_lm": Family(("llama",), VIDEO, (ADJACENT,), layout="calibrated in time"),
    "deepseek_vl": Family(("llama",), image_lengths="equal", layout="calibrated"),
    "janus": Family(("llama",), image_lengths="equal", layout="calibrated"),
    "granite4_vision": Family(("granite4_vision_text",), limits=(ADJACENT,)),
    # ---- Qwen
    "qwen2_vl": Family(("qwen2_vl_text",), VIDEO, (AXES,), layout=GRIDS, served=("Qwen2VLForConditionalGeneration",)),
    "qwen2_5_vl": Family(
        ("qwen2_5_vl_text",), VIDEO, (AXES,), layout=GRIDS, served=("Qwen2_5_VLForConditionalGeneration",)
    ),
    "qwen3_vl": Family(("qwen3_vl_text",), VIDEO, (AXES,), layout=GRIDS, served=("Qwen3VLForConditionalGeneration",)),
    "qwen3_vl_moe": Family(
        ("qwen3_vl_moe_text",), VIDEO, (AXES,), layout=GRIDS, served=("Qwen3VLMoeForConditionalGeneration",)
    ),
    "qwen2_5_omni_thinker": Family(("qwen2_5_omni_text",), VIDEO, (AXES,), layout=GRIDS),
    "qwen3_omni_moe_thinker": Family(("qwen3_omni_moe_text",), VIDEO, (AXES,), layout=GRIDS),
    "qwen3_5": Family(("qwen3_5_text",), VIDEO, (AXES, RECURRENT), layout=GRIDS),
    "qwen3_5_moe": Family(("qwen3_5_moe_text",), VIDEO, (AXES, RECURRENT), layout=GRIDS),
    "qwen4_exp": Family(("qwen4_exp_text",), VIDEO, refused=_unknown("indexed_attention")),
    "video_llama_3": Family(("qwen2",), VIDEO, (ADJACENT,), layout="patch grids"),
    "cosmos3_edge": Family(("cosmos3_edge_text",), VIDEO, (AXES,), layout=GRIDS),
    "cosmos3_omni": Family(("qwen3_vl_text",), VIDEO, (AXES,), layout=GRIDS),
    # ---- images in tiles or rows
    "internvl": Family(
        ("qwen2",),
        VIDEO,
        (FRAMES,),
        layout="calibrated in time",
        served=("InternVLForConditionalGeneration", "InternVLChatModel"),
    ),
    "qianfan_ocr": Family(("qwen3",), layout="calibrated"),
    "idefics2": Family(
        ("mistral",), ("image",), (ADJACENT, ALL_WINDOWED), "separators", "tokens around each part", no_layout=RESAMPLED
    ),
    "idefics3": Family(("llama",), image_lengths="whole image last", split=TILES, layout="calibrated"),
    "smolvlm": Family(("llama",), VIDEO, (FRAMES,), "whole image last", TILES, layout="calibrated in time"),
    "granite_docling": Family(("granite_docling_text",), image_lengths="named tiles", split=TILES, layout="calibrated"),
    "mistral3": Family(
        ("mistral", "mistral4"), image_lengths="rows of patches", split="breaks of rows", layout="pixel sizes"
    ),
    "lighton_ocr": Family(("qwen3",), image_lengths="rows of patches", layout="pixel sizes"),
    "aya_vision": Family(("cohere2",), ("image",), (WINDOWS, STATIC), "end token", TILES, layout="calibrated"),
    "cohere2_vision": Family(
        ("cohere2",), ("image",), (WINDOWS, STATIC), "separators", "breaks of tiles", layout="calibrated"
    ),
    "cohere_compass": Family(("cohere_compass_text",), VIDEO, (OWN_ROPE, WINDOWS, STATIC), layout=GRIDS),
    "llama4": Family(
        ("llama4_text",), ("image",), (CHUNKS, FLOOR, BROKEN), "end token", "separators of tiles", layout="calibrated"
    ),
    "molmo2": Family(("molmo2_text",), VIDEO, (FRAMES,), "two grids", "columns' ends", layout="molmo", two_way=True),
    "step3p7": Family(
        ("step3p5",), limits=_GEMMA, image_lengths="local views", split="tokens around each view", layout="calibrated"
    ),
    "ovis2": Family(("qwen2",), image_lengths="separators", split="indicators of tiles", layout="calibrated"),
    "got_ocr2": Family(("qwen2",), layout="calibrated"),
    "aria": Family(("aria_text",), image_lengths="equal", no_layout=RESAMPLED),
    "phi4_multimodal": Family(("phi4_multimodal",), limits=(ADJACENT,), layout="phi4"),
    "fuyu": Family(("persimmon",), image_lengths="separators", split="a newline behind each row"),
    # ---- Gemma
    "paligemma": Family(
        ("gemma", "gemma2"), limits=(WINDOWS, STATIC), image_lengths="equal", layout="calibrated", two_way=True
    ),
    "gemma3": Family(
        ("gemma3_text",),
        limits=(*_GEMMA, TWO_WAY, CROPS),
        image_lengths="equal",
        layout="calibrated",
        two_way=True,
        picture_tokens="mm_tokens_per_image",
    ),
    "shieldgemma2": Family(
        ("gemma3_text",), limits=(*_GEMMA, TWO_WAY, CROPS), image_lengths="equal", layout="calibrated", two_way=True
    ),
    "gemma3n": Family(
        ("gemma3n_text",),
        limits=(*_GEMMA, SHARED),
        image_lengths="equal",
        layout="calibrated",
        picture_tokens="vision_soft_tokens_per_image",
    ),
    "gemma4": Family(
        ("gemma4_text",), VIDEO, (*_GEMMA, TWO_WAY, SHARED), "pooled patches", layout="placed patches", two_way=True
    ),
    "gemma4_unified": Family(
        ("gemma4_unified_text",), VIDEO, (*_GEMMA, TWO_WAY), "pooled patches", layout="placed patches", two_way=True
    ),
    # ---- GLM and others with positions of several axes
    "glm4v": Family(("glm4v_text",), VIDEO, (AXES,), layout=GRIDS),
    "glm4v_moe": Family(("glm4v_moe_text",), VIDEO, (AXES,), layout=GRIDS),
    "glm46v": Family(("glm4v_text",), VIDEO, (AXES,), layout=GRIDS),
    "glmga": Family(("glm4v_text",), VIDEO, (AXES,), layout=GRIDS),
    "glm_ocr": Family(("glm_ocr_text",), VIDEO, (AXES,), layout=GRIDS),
    "paddleocr_vl": Family(("paddleocr_vl_text",), limits=(AXES,), layout="patch grids"),
    "ernie4_5_vl_moe": Family(("ernie4_5_vl_moe_text",), VIDEO, (AXES,), layout="patch grids"),
    "hunyuan_vl": Family(("hunyuan_vl_text",), limits=(DYNAMIC_ROPE,), layout="newline grids"),
    "exaone4_5": Family(("exaone4",), VIDEO, (WINDOWS, STATIC), layout=GRIDS),
    "hyperclovax_vision_v2": Family(("hyperclovax",), VIDEO, layout=GRIDS),
    "muse_glimmer": Family(("muse_glimmer_text",), VIDEO, (WINDOWS, STATIC), layout=GRIDS),
    # ---- latent attention
    "kimi_k25": Family(("deepseek_v3",), VIDEO, layout="calibrated"),
    "deepseek_ocr2": Family(
        ("deepseek_ocr2_text",),
        limits=(ADJACENT,),
        no_layout="its encoder's learned queries make each of its tokens from the whole picture",
    ),
    "mistral_large4": Family(("mistral_large4_text",), refused=_unknown("indexed_attention")),
    "minimax_m3_vl": Family(("minimax_m3_vl_text",), VIDEO, refused=_unknown("minimax_m3_sparse")),
    "unlimited_ocr": Family(("unlimited_ocr_text",), refused=_unknown("reference_sliding_attention")),
    # ---- convolutions and linear attention
    "lfm2_vl": Family(("lfm2",), ("image",), (RECURRENT,), "end token", TILES, layout="calibrated"),
    "lfm3_vl": Family(("lfm3",), VIDEO, (OWN_ROPE, RECURRENT, WINDOWS), layout=GRIDS),
    "nemotron_h_omni": Family(("nemotron_h",), refused="it has no decoder with `layers` and `embed_tokens`"),
    # ---- images as tokens of the vocabulary
    "chameleon": Family(("chameleon",), image_lengths="equal", layout="calibrated"),
    "emu3": Family(("emu3_text_model",)),
    "apertus1p5": Family(("apertus1p5_text",), image_lengths="separators", split="breaks of rows"),
    # ---- no visual token passes through a decoder of the common form
    "mllama": Family(("mllama_text_model",), refused=_CROSS),
    "idefics": Family(("idefics",), refused=_CROSS),
    "blip-2": Family(("opt", "t5"), refused=_QUERIES, no_layout=QUERIED),
    "instructblip": Family(("llama", "t5"), refused=_QUERIES, no_layout=QUERIED),
    "instructblipvideo": Family(("llama", "t5"), ("video",), refused=_QUERIES, no_layout=QUERIED),
    "florence2": Family(("bart",), refused=_ENCODER_DECODER),
    "pix2struct": Family(("pix2struct_text_model",), refused=_ENCODER_DECODER),
    "udop": Family(("udop",), refused=_ENCODER_DECODER),
    "kosmos-2": Family(("kosmos_2_text_model",), refused=_PLACED),
    "git": Family(
        ("git",), refused="its image features are put before the text inside the model, without placeholders"
    ),
    "kosmos-2.5": Family(("kosmos_2_5_text_model",), refused=_PLACED),
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
