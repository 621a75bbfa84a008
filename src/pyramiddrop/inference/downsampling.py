"""Downsample pictures for processors whose visual tokens follow the picture's size, by their own pixel budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from pyramiddrop.inference.prefill_stats import StageTokens, Usage
from pyramiddrop.methods import Compose, Downsample, Method

#: More pixels than any budget has.
MOST_PIXELS = 2**40
#: A `size` with which a processor does not resize pictures of suitable sides.
ANY_SIZE = {"shortest_edge": 1, "longest_edge": MOST_PIXELS}


def has_pixel_budget(processor: Any) -> bool:
    """True if the processor resizes each picture to a pixel budget and makes a token of each square of patches, like
    those of Qwen2-VL and relatives."""
    images = getattr(processor, "image_processor", None)
    bounds = dict(getattr(images, "size", None) or {})
    return (
        images is not None
        and "image_grid_thw" in getattr(images, "model_input_names", ())
        and all(bounds.get(name) is not None for name in ANY_SIZE)
        and hasattr(images, "merge_size")
        and hasattr(images, "get_number_of_image_patches")
        and isinstance(images.get_number_of_image_patches(64, 64, {}), int)
    )


def split_downsampling(method: Method | None, processor: Any) -> tuple[float | None, Method | None]:
    """Split a method into the share of visual tokens for the `processor`, and the method for the model.

    The share is None unless the method downsamples pictures and the processor has a pixel budget: then the model sees
    smaller pictures, and only the second method of `Downsample() | PyramidDrop()` is applied to it.
    """
    before, inside = method.parts if isinstance(method, Compose) else (method, None)
    if isinstance(before, Downsample) and has_pixel_budget(processor):
        return before.keep, inside
    return None, method


def downsample(processor: Any, pictures: Sequence[Image.Image], keep: float) -> list[Image.Image]:
    """Resize each picture to the largest size with at most the share `keep` of its visual tokens.

    Size and filter are those of the processor at a smaller pixel budget (`size` with equal "shortest_edge" and
    "longest_edge"), which preserves the aspect ratio approximately; the budget may be below the smallest one in the
    processor's configuration. With `ANY_SIZE`, the processor does not resize the results again.

    Args:
        processor: one with a pixel budget.
        keep: in (0, 1]; of N tokens, at most floor(N * keep) remain, and at least 1.
    """
    images = processor.image_processor

    def tokens(picture: Image.Image, pixels: int | None = None) -> int:
        """The number of visual tokens at a budget of exactly `pixels`, under the names that processors use."""
        size = {"min_pixels": pixels, "max_pixels": pixels, "size": dict.fromkeys(ANY_SIZE, pixels)} if pixels else {}
        patches = int(images.get_number_of_image_patches(picture.height, picture.width, size))
        return patches // int(images.merge_size) ** 2

    found = []
    for picture in pictures:
        allowed = max(1, math.floor(tokens(picture) * keep))
        pixels = bisect_right(range(1, MOST_PIXELS), allowed, key=partial(tokens, picture))
        size = dict.fromkeys(ANY_SIZE, pixels)
        (grid,) = images(images=[picture], size=size, return_tensors="pt")["image_grid_thw"]
        height, width = (int(side) * images.patch_size for side in grid[1:])
        found.append(picture.resize((width, height), images.resample))
    return found


def downsampled_usage(used: Usage, vanilla: Usage) -> Usage:
    """The usage of a prefill with downsampled pictures, expressed as a drop before the decoder."""
    left, total = used.visual_tokens, vanilla.visual_tokens
    smaller = StageTokens(0, left / total, left)
    return replace(used, visual_tokens=total, stages=(smaller, *used.stages))
