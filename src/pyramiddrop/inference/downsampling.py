"""Make pictures smaller for a processor whose visual tokens follow the picture's size, by its own pixel budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from pyramiddrop.inference.prefill_stats import StageTokens, Usage
from pyramiddrop.methods import Compose, Downsample, Method

#: What a processor is given so that it takes a picture as it is, if the sides of the picture suit it.
ANY_SIZE = {"shortest_edge": 1, "longest_edge": 2**40}


def has_pixel_budget(processor: Any) -> bool:
    """Whether the processor resizes each picture to a number of pixels, and makes a token of each square of patches, as
    those of Qwen2-VL and its kin do."""
    images = getattr(processor, "image_processor", None)
    bounds = dict(getattr(images, "size", None) or {})
    return (
        images is not None
        and "image_grid_thw" in getattr(images, "model_input_names", ())
        and all(bounds.get(name) is not None for name in ANY_SIZE)
        and hasattr(images, "merge_size")
        and isinstance(images.get_number_of_image_patches(64, 64, {}), int)
    )


def split_downsampling(method: Method | None, processor: Any) -> tuple[float | None, Method | None]:
    """The share of the visual tokens that the `processor` is to leave, and the method that is left for the model.

    (None, `method`) unless the method makes pictures smaller and the processor has a pixel budget: then the model is
    shown smaller pictures, and of `Downsample() | PyramidDrop()` the second method drops inside it.
    """
    before, inside = method.parts if isinstance(method, Compose) else (method, None)
    if isinstance(before, Downsample) and has_pixel_budget(processor):
        return before.keep, inside
    return None, method


def downsample(processor: Any, pictures: Sequence[Image.Image], keep: float) -> list[Image.Image]:
    """Each picture at the largest size at which it has no more than the share `keep` of its visual tokens.

    The sizes are those to which the processor resizes at a smaller pixel budget (`size` with equal "shortest_edge" and
    "longest_edge"), which keeps the aspect ratio as nearly as it can; so is the filter. Below the smallest budget that
    the processor's configuration has, too. Given `ANY_SIZE`, the processor takes the results as they are.

    Args:
        processor: one with a pixel budget.
        pictures: in RGB, of any sizes.
        keep: in (0, 1]; of N tokens floor(N * keep) may stay, and at least 1.
    """
    return [_downsample(processor.image_processor, picture, keep) for picture in pictures]


def _downsample(images: Any, picture: Image.Image, keep: float) -> Image.Image:
    def tokens(**size: Any) -> int:
        patches = int(images.get_number_of_image_patches(picture.height, picture.width, size))
        return patches // int(images.merge_size) ** 2

    allowed = max(1, math.floor(tokens() * keep))
    pixels = _largest(lambda pixels: tokens(**_budget(pixels)) <= allowed)
    size = _budget(pixels)["size"]
    (grid,) = images(images=[picture], size=size, return_tensors="pt")["image_grid_thw"]
    height, width = (int(side) * images.patch_size for side in grid[1:])
    return picture.resize((width, height), images.resample)


def _budget(pixels: int) -> dict[str, Any]:
    """A budget of exactly so many pixels, under the names that one processor or another takes."""
    return {
        "min_pixels": pixels,
        "max_pixels": pixels,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
    }


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest whole number from 1 on that fits; all below one that fits do, and 1 does."""
    above = 2
    while fits(above):
        above *= 2
    low = above // 2
    while above - low > 1:
        middle = (low + above) // 2
        low, above = (middle, above) if fits(middle) else (low, middle)
    return low


def downsampled_usage(used: Usage, vanilla: Usage) -> Usage:
    """What a prefill of smaller pictures `used`, told as a drop before the decoder of what the pictures bring."""
    left, total = used.visual_tokens, vanilla.visual_tokens
    smaller = StageTokens(0, left / total, left)
    return replace(used, visual_tokens=total, stages=(smaller, *used.stages))
