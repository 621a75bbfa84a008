"""Place the visual tokens of a prompt in its pictures and videos, by the layouts that `families.py` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from PIL import Image

from pyramiddrop.families import FAMILIES, Family
from pyramiddrop.report.token_layout import crops, grids
from pyramiddrop.report.token_layout.geometry import CannotPlaceError, FrameRange, Prompt, Size, View

#: The views of each picture of a prompt.
Views = list[list[View]]

#: The layout of the tokens of pictures, and of videos if it is known.
Layout = tuple[Callable[[Prompt], Views], Callable[[Prompt], list[list[FrameRange]]] | None]

#: Vision towers whose input is a grid of patches of one fixed size, and if they have a class token.
CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}


def _each(one: Callable[[Prompt, Size], list[View]]) -> Callable[[Prompt], Views]:
    """Lay out each picture by its size alone, so that pictures of one size are processed once."""

    def each(prompt: Prompt) -> Views:
        of_size = cache(partial(one, prompt))
        return [of_size(picture.size) for picture in prompt.pictures]

    return each


def _each_row(one: Callable[..., list[View]], *names: str) -> Callable[[Prompt], Views]:
    """Lay out each picture by its rows of the processor's outputs `names`."""
    return lambda prompt: [one(prompt, *own) for own in zip(prompt.pictures, *map(prompt.rows, names), strict=True)]


_by_pixels, _by_grid = _each_row(grids.pixel_size, "image_sizes"), _each_row(grids.patch_grid, "image_grid_thw")


def _llava(prompt: Prompt) -> Views:
    vision = prompt.config.vision_config.model_type
    if vision == "pixtral":
        return _by_pixels(prompt)
    if vision not in CLASS_TOKEN:
        raise CannotPlaceError(f"cannot place the visual tokens of a {vision!r} vision tower in the picture")
    return _of_one_crop(prompt, CLASS_TOKEN[vision])


def _of_one_crop(prompt: Prompt, has_class_token: bool = True) -> Views:
    kept = has_class_token and prompt.config.vision_feature_select_strategy == "full"
    return _each(partial(crops.calibrated_whole_view, class_token=kept))(prompt)


def _each_video(leading: int = 0, trailing: int = 0) -> Callable[[Prompt], list[list[FrameRange]]]:
    return lambda prompt: [crops.calibrated_frame_ranges(prompt, frames, leading, trailing) for frames in prompt.videos]


#: The layouts by their names in `families.py`.
LAYOUTS: dict[str, Layout] = {
    "llava": (_llava, None),
    "one crop": (_of_one_crop, _each_video(leading=1)),  # each frame keeps its class token
    "anyres": (_each(grids.next_views), _each_video()),
    "onevision": (_each(grids.onevision_views), _each_video(trailing=1)),  # one newline token
    "calibrated": (_each(crops.calibrated_views), None),
    "calibrated in time": (_each(crops.calibrated_views), _each_video()),
    "patch grids": (_by_grid, None),
    "patch grids in time": (_by_grid, grids.patch_grids_in_time),
    "newline grids": (_each_row(partial(grids.patch_grid, newlines=True), "image_grid_thw"), None),
    "placed patches": (_each_row(grids.placed_patches, "image_position_ids"), grids.placed_patches_in_time),
    "pixel sizes": (_by_pixels, None),
    "molmo": (grids.molmo_views, grids.molmo_frame_ranges),
    "phi4": (_each_row(crops.phi4_views, "image_attention_mask", "image_sizes"), None),
}


__all__ = ["CannotPlaceError", "PlacedView", "place_pictures"]


@dataclass(frozen=True)
class PlacedView:
    """A picture and one of its views. For a video, the picture is a frame, and `moment` its index."""

    picture: Image.Image
    view: View
    moment: int | None = None


def place_pictures(
    config: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    inputs: Mapping[str, Any] | None = None,
    videos: Sequence[Sequence[Image.Image]] = (),
) -> list[PlacedView]:
    """All views of all pictures and videos, in the order of their tokens in the prompt.

    Args:
        config: the model's configuration; `config.model_type` names the family.
        pictures: the pictures of one prompt, in its order.
        inputs: the processor's outputs for this prompt alone; families that keep a picture's shape need them.
        videos: the frames of each video, as the model saw them; videos come after the pictures.

    Raises:
        CannotPlaceError: if the places of the family's visual tokens are unknown, or unknown under its settings.
        ValueError: if `inputs` are needed and missing, or belong to other frames.
    """
    family = FAMILIES.get(config.model_type, Family())
    layout, video_layout = LAYOUTS.get(family.layout, (None, None))
    if layout is None or (videos and video_layout is None):
        where, what = ("", "a picture") if layout is None else (" of a video", "a frame")
        reason = family.no_layout or f"nobody has worked out here how it cuts {what}"
        raise CannotPlaceError(f"cannot place the visual tokens{where} of model type {config.model_type!r}: {reason}")
    prompt = Prompt(config, processor, pictures, inputs or {}, videos)
    placed = []
    for number, (picture, views) in enumerate(zip(pictures, layout(prompt) if pictures else [], strict=True), start=1):
        for view in views:
            name = f"{view.name} {number}" if len(pictures) > 1 else view.name
            placed.append(PlacedView(picture, replace(view, name=name)))
    ranges = video_layout(prompt) if video_layout and videos else []
    for number, (frames, found) in enumerate(zip(videos, ranges, strict=True), start=1):
        for one in found:
            name = f"frames {one.first + 1}-{one.last + 1}" if one.last > one.first else f"frame {one.first + 1}"
            name += f" of video {number}" if len(videos) > 1 else ""
            placed.append(PlacedView(frames[one.first], replace(one.view, name=name), one.first))
    return placed
