"""What cannot be seen in a model itself: one entry a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from pyramiddrop.hf.anyres import token_count

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
    """One entry.

    Attributes:
        image_lengths: tokens of each image of a call, in order, or None where unknown (then a run of visual tokens
            is one image).
        refused: why staged dropping cannot work on the family, where its structure does not show it.
    """

    image_lengths: ImageLengths | None = None
    refused: str = ""


FAMILIES: dict[str, Family] = {
    "llava": Family(_equal_lengths),
    "llava_next": Family(_anyres_lengths),
}
