"""How many visual tokens each image of a call has, for families that tell: one function a kind of family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from pyramiddrop.hf.anyres import token_count

#: (configuration, call, (B, L) bool visual tokens of images in it) -> tokens of each image in order, or None where it
#: cannot tell.
ImageLengths = Callable[[PretrainedConfig, Mapping[str, Any], Tensor], Sequence[int] | None]


_MERGES = ("spatial_merge_size", "merge_kernel_size", "merge_size")  # how many patches on a side are one token


def equal_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Every image has the same number."""
    encoded, pixels, visual_tokens = _encoded_lengths(call), call.get("pixel_values"), int(image.sum())
    if encoded is not None or pixels is None or visual_tokens % len(pixels):
        return encoded
    return [visual_tokens // len(pixels)] * len(pixels)


def grid_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Qwen-VL and its kin: one token for a square of patches, of whose grids the call tells."""
    if not any(hasattr(getattr(config, "vision_config", None), name) for name in _MERGES):
        return None
    encoded, grids = _encoded_lengths(call), call.get("image_grid_thw")
    if encoded is not None or grids is None:
        return encoded
    return _in_proportion(grids.prod(-1).tolist(), image)


def pooled_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Gemma 4: one token for a square of patches, each of which has a position, and filler -1."""
    encoded, places = _encoded_lengths(call), call.get("image_position_ids")
    if encoded is not None or places is None:
        return encoded
    return _in_proportion((places >= 0).all(-1).sum(-1).tolist(), image)


def _in_proportion(patches: Sequence[int], image: Tensor) -> Sequence[int] | None:
    """Tokens of each image, each of which stands for equally many of its `patches`; None where that does not fit."""
    merged, rest = divmod(sum(patches), max(1, int(image.sum())))
    if rest or any(count % merged for count in patches):
        return None
    return [count // merged for count in patches]


def anyres_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """LLaVA-NeXT: the base crop, and the unpadded grid with one newline token a row."""
    encoded, sizes = _encoded_lengths(call), call.get("image_sizes")
    if encoded is not None or sizes is None:
        return encoded
    return [_anyres_length(config, int(height), int(width)) for height, width in sizes]


def pixtral_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Mistral 3: a token for each square of merged patches; rows of them stand apart."""
    encoded, sizes = _encoded_lengths(call), call.get("image_sizes")
    if encoded is not None or sizes is None:
        return encoded
    side = config.vision_config.patch_size * config.spatial_merge_size
    return [(int(height) // side) * (int(width) // side) for height, width in sizes]


def molmo_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Molmo 2: the whole image and its crops, as two grids in rows that stand apart; or a video's frames."""
    encoded, images, videos = _encoded_lengths(call), call.get("image_grids"), call.get("video_grids")
    if encoded is not None:
        return encoded
    if images is not None:
        return [int(high * wide + rows * columns) for high, wide, rows, columns in images]
    if videos is not None:
        return [int(frames * rows * columns) for frames, rows, columns in videos]
    return _encoded_lengths(call, "video")


def step_lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Step 3.7: local views, of which the call tells how many, and the whole image."""
    encoded, counts = _encoded_lengths(call), call.get("num_local_patches")
    if encoded is not None or counts is None:
        return encoded
    counts = [int(count) for count in counts]
    whole = (config.vision_config.image_size // config.vision_config.patch_size // 4) ** 2
    local = (int(image.sum()) - whole * len(counts)) // max(sum(counts), 1)
    return [whole + local * count for count in counts]


def _encoded_lengths(call: Mapping[str, Any], modality: str = "image") -> list[int] | None:
    """Tokens of each image or video where `generate` has already encoded them (Transformers 5.2x hands the features,
    and not what they were made of, to the forward)."""
    encoded = (call.get("mm_encoder_outputs") or {}).get(modality)
    return None if encoded is None else [len(features) for features in encoded.pooler_output]


def _anyres_length(config: PretrainedConfig, height: int, width: int) -> int:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tiles_high, tiles_wide = get_anyres_image_grid_shape(
        (height, width), config.image_grid_pinpoints, vision.image_size
    )
    class_token = config.vision_feature_select_strategy == "full"
    return token_count((tiles_high * side, tiles_wide * side), side, height, width, class_token)
