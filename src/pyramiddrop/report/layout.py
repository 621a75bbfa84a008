"""Owns what each model family sees of a picture: the views that its processor and its vision tower make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from pyramiddrop.report.grid import Box, View, reading_order, shortest_edge_size, single_view, tiled_views

#: Vision towers that cut a picture of one fixed size into a grid of patches.
WITH_CLASS_TOKEN, WITHOUT_CLASS_TOKEN = ("clip_vision_model",), ("siglip_vision_model",)

#: Families that keep a picture's own shape; their processors return `image_grid_thw`.
DYNAMIC = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")


class CannotPlaceError(ValueError):
    """Nobody knows here which part of the picture each visual token of this model is made from."""


@dataclass(frozen=True)
class Seen:
    """A picture, and one view of it. For a video the picture is one frame, and `moment` its number among those seen."""

    picture: Image.Image
    view: View
    moment: int | None = None


def look(config: Any, image_processor: Any, pictures: Sequence[Image.Image], grids: Any = None) -> list[Seen]:
    """All views of all pictures, in the order in which their tokens stand in the prompt.

    Args:
        config: the model's configuration; `config.model_type` says which family it is.
        image_processor: the checkpoint's image processor.
        grids: the processor's `image_grid_thw`, one (frames, rows, columns) of patches a picture, where it gives one.

    Raises:
        CannotPlaceError: for a family, or a setting of it, whose visual tokens this module cannot place.
        ValueError: for a family of dynamic resolution without `grids`.
    """
    if config.model_type in DYNAMIC:
        return _numbered(pictures, _dynamic(config, pictures, grids))
    views = _FAMILIES.get(config.model_type)
    if views is None:
        known = ", ".join([*_FAMILIES, *DYNAMIC])
        raise CannotPlaceError(f"cannot place the visual tokens of model type {config.model_type!r} (known: {known})")
    return _numbered(pictures, [views(config, image_processor, picture) for picture in pictures])


def _numbered(pictures: Sequence[Image.Image], views: Sequence[Sequence[View]]) -> list[Seen]:
    return [
        Seen(picture, replace(view, name=f"{view.name} {number}") if len(pictures) > 1 else view)
        for number, (picture, own) in enumerate(zip(pictures, views, strict=True), start=1)
        for view in own
    ]


def _dynamic(config: Any, pictures: Sequence[Image.Image], grids: Any) -> list[list[View]]:
    """The picture is stretched to a whole number of patches; a square of `spatial_merge_size` of them is one token."""
    if grids is None or len(grids) != len(pictures):
        raise ValueError(
            f"{config.model_type} needs the processor's image_grid_thw, one row a picture, to place tokens"
        )
    merge = config.vision_config.spatial_merge_size
    return [
        [View("picture", int(rows) // merge, int(columns) // merge, _whole(picture))]
        for picture, (_, rows, columns) in zip(pictures, grids, strict=True)
    ]


def _gemma3(config: Any, image_processor: Any, picture: Image.Image) -> list[View]:
    if getattr(image_processor, "do_pan_and_scan", None):
        raise CannotPlaceError("cannot place the visual tokens of gemma3 with do_pan_and_scan")
    side = math.isqrt(config.mm_tokens_per_image)
    return [View("picture", side, side, _whole(picture))]


def _paligemma(config: Any, image_processor: Any, picture: Image.Image) -> list[View]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [View("picture", side, side, _whole(picture))]


def _whole(picture: Image.Image) -> Box:
    return Box(0, 0, picture.width, picture.height)


def _llava(config: Any, image_processor: Any, picture: Image.Image) -> list[View]:
    vision = config.vision_config.model_type
    if vision not in (*WITH_CLASS_TOKEN, *WITHOUT_CLASS_TOKEN):
        raise CannotPlaceError(f"cannot place the visual tokens of a {vision!r} vision tower in the picture")
    resized = _resized(image_processor, picture)
    crop = (_size(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else None) or resized
    view = single_view(*picture.size, resized, crop, config.vision_config.patch_size)
    kept_class_token = config.vision_feature_select_strategy == "full" and vision in WITH_CLASS_TOKEN
    return [replace(view, cells=reading_order(view.rows, view.columns, leading=1)) if kept_class_token else view]


def _llava_next(config: Any, image_processor: Any, picture: Image.Image) -> list[View]:
    width, height = picture.size
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    vision = config.vision_config
    return tiled_views(width, height, tuple(best), vision.image_size, vision.patch_size)


def _resized(image_processor: Any, picture: Image.Image) -> tuple[int, int]:
    if not image_processor.do_resize:
        return picture.height, picture.width
    return _size(image_processor.size) or shortest_edge_size(*picture.size, image_processor.size["shortest_edge"])


def _size(size: Any) -> tuple[int, int] | None:
    """Height and width of a processor's size, or None where it names the shortest edge."""
    return (size["height"], size["width"]) if size.get("height") else None


_FAMILIES: dict[str, Callable[[Any, Any, Image.Image], list[View]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
}
