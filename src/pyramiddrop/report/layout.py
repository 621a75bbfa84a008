"""Owns what each model family sees of a picture: the views that its processor and its vision tower make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from pyramiddrop.report.grid import View, shortest_edge_size, single_view, tiled_views

#: Vision towers that cut a picture of one fixed size into a grid of patches.
WITH_CLASS_TOKEN, WITHOUT_CLASS_TOKEN = ("clip_vision_model",), ("siglip_vision_model",)


@dataclass(frozen=True)
class Seen:
    """A picture, and one view of it."""

    picture: Image.Image
    view: View


def look(config: Any, image_processor: Any, pictures: Sequence[Image.Image]) -> list[Seen]:
    """All views of all pictures, in the order in which their tokens stand in the prompt.

    Args:
        config: the model's configuration; `config.model_type` says which family it is.
        image_processor: the checkpoint's image processor.

    Raises:
        ValueError: for a family whose visual tokens this module cannot place.
    """
    views = _FAMILIES.get(config.model_type)
    if views is None:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"cannot place the visual tokens of model type {config.model_type!r} (known: {known})")
    return [
        Seen(picture, replace(view, name=f"{view.name} {number}") if len(pictures) > 1 else view)
        for number, picture in enumerate(pictures, start=1)
        for view in views(config, image_processor, picture)
    ]


def _llava(config: Any, image_processor: Any, picture: Image.Image) -> list[View]:
    vision = config.vision_config.model_type
    if vision not in (*WITH_CLASS_TOKEN, *WITHOUT_CLASS_TOKEN):
        raise ValueError(f"cannot place the visual tokens of a {vision!r} vision tower in the picture")
    resized = _resized(image_processor, picture)
    crop = (_size(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else None) or resized
    view = single_view(*picture.size, resized, crop, config.vision_config.patch_size)
    kept_class_token = config.vision_feature_select_strategy == "full" and vision in WITH_CLASS_TOKEN
    return [replace(view, leading=1) if kept_class_token else view]


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


_FAMILIES: dict[str, Callable[[Any, Any, Image.Image], list[View]]] = {"llava": _llava, "llava_next": _llava_next}
