"""The families whose visual tokens have a known place, and the reasons why those of others have none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from pyramiddrop.report.token_layout.crops import (
    calibrated_moments,
    calibrated_views,
    calibrated_whole_view,
    phi4_views,
)
from pyramiddrop.report.token_layout.geometry import View
from pyramiddrop.report.token_layout.grids import (
    newline_grids,
    next_views,
    onevision_views,
    patch_grids,
    patch_grids_in_time,
    pixel_sizes,
    placed_patches,
    placed_patches_in_time,
)
from pyramiddrop.report.token_layout.molmo import molmo_moments, molmo_views
from pyramiddrop.report.token_layout.prompt import CannotPlaceError, Moment, Prompt, Size

#: The views of each picture of a prompt.
Views = list[list[View]]

#: Vision towers that cut a picture of one fixed size into a grid of patches.
WITH_CLASS_TOKEN, WITHOUT_CLASS_TOKEN = ("clip_vision_model",), ("siglip_vision_model",)


def views(prompt: Prompt) -> Views:
    """The views of each picture, in the order in which their tokens stand in the prompt.

    Raises:
        CannotPlaceError: for a family, or a setting of it, whose visual tokens have no known place.
        ValueError: where the processor's outputs are needed and were not given.
    """
    family = prompt.config.model_type
    if family in NO_PLACE:
        raise CannotPlaceError(f"cannot place the visual tokens of model type {family!r}: {NO_PLACE[family]}")
    if family not in FAMILIES:
        reason = "nobody has worked out here how it cuts a picture"
        raise CannotPlaceError(f"cannot place the visual tokens of model type {family!r}: {reason}")
    return FAMILIES[family](prompt) if prompt.pictures else []


def moments(prompt: Prompt) -> list[list[Moment]]:
    """The views of each video, in the order of the prompt. Raises as :func:`views` does."""
    family = prompt.config.model_type
    if prompt.videos and family not in VIDEOS:
        reason = NO_PLACE.get(family, "nobody has worked out here how it cuts a frame")
        raise CannotPlaceError(f"cannot place the visual tokens of a video of model type {family!r}: {reason}")
    return VIDEOS[family](prompt) if prompt.videos else []


def _each(one: Callable[[Prompt, Size], list[View]]) -> Callable[[Prompt], Views]:
    """By the size of each picture: those of one size are cut alike, and a processor is asked once for all of them."""

    def each(prompt: Prompt) -> Views:
        of_size = cache(partial(one, prompt))
        return [of_size(picture.size) for picture in prompt.pictures]

    return each


def _llava(prompt: Prompt) -> Views:
    vision = prompt.config.vision_config
    if vision.model_type == "pixtral":
        return pixel_sizes(prompt)
    if vision.model_type not in (*WITH_CLASS_TOKEN, *WITHOUT_CLASS_TOKEN):
        raise CannotPlaceError(f"cannot place the visual tokens of a {vision.model_type!r} vision tower in the picture")
    return _of_one_crop(prompt, vision.model_type in WITH_CLASS_TOKEN)


def _of_one_crop(prompt: Prompt, has_class_token: bool = True) -> Views:
    kept = has_class_token and prompt.config.vision_feature_select_strategy == "full"
    return _each(partial(calibrated_whole_view, class_token=kept))(prompt)


def _each_video(leading: int = 0, trailing: int = 0) -> Callable[[Prompt], list[list[Moment]]]:
    return lambda prompt: [calibrated_moments(prompt, frames, leading, trailing) for frames in prompt.videos]


#: Families whose processors tell the patches of pictures, and of videos.
GRIDS_IN_TIME = (
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "exaone4_5",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "hyperclovax_vision_v2",
    "lfm3_vl",
    "muse_glimmer",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
)

FAMILIES: dict[str, Callable[[Prompt], Views]] = {
    "llava": _llava,
    "video_llava": _of_one_crop,
    **dict.fromkeys(("llava_next", "llava_next_video"), _each(next_views)),
    "llava_onevision": _each(onevision_views),
    **dict.fromkeys(
        (
            "aya_vision",
            "chameleon",
            "cohere2_vision",
            "deepseek_vl",
            "fast_vlm",
            "gemma3",
            "gemma3n",
            "got_ocr2",
            "granite_docling",
            "idefics3",
            "internvl",
            "janus",
            "kimi_k25",
            "lfm2_vl",
            "llama4",
            "ovis2",
            "paligemma",
            "perception_lm",
            "qianfan_ocr",
            "smolvlm",
            "step3p7",
            "vipllava",
        ),
        _each(calibrated_views),
    ),
    **dict.fromkeys((*GRIDS_IN_TIME, "ernie4_5_vl_moe", "paddleocr_vl", "video_llama_3"), patch_grids),
    "hunyuan_vl": newline_grids,
    **dict.fromkeys(("gemma4", "gemma4_unified"), placed_patches),
    **dict.fromkeys(("lighton_ocr", "mistral3"), pixel_sizes),
    "molmo2": molmo_views,
    "phi4_multimodal": phi4_views,
}

#: Of these also videos can be placed.
VIDEOS: dict[str, Callable[[Prompt], list[list[Moment]]]] = {
    **dict.fromkeys(GRIDS_IN_TIME, patch_grids_in_time),
    **dict.fromkeys(("gemma4", "gemma4_unified"), placed_patches_in_time),
    **dict.fromkeys(("internvl", "llava_next_video", "perception_lm", "smolvlm"), _each_video()),
    "molmo2": molmo_moments,
    "llava_onevision": _each_video(trailing=1),  # one newline token
    "video_llava": _each_video(leading=1),  # each frame keeps its class token
}

_RESAMPLED = "a resampler makes each of its tokens from the whole picture"
_QUERIED = "a Q-Former makes each of its tokens from the whole picture"

NO_PLACE: dict[str, str] = {
    **dict.fromkeys(("aria", "idefics2"), _RESAMPLED),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _QUERIED),
    "deepseek_ocr2": "its encoder's learned queries make each of its tokens from the whole picture",
}
