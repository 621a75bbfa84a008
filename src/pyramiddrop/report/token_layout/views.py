"""Place the visual tokens of a prompt in its pictures and videos, by the layouts that `families.py` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from PIL import Image

from pyramiddrop.families import FAMILIES, Family
from pyramiddrop.report.token_layout.crops import (
    calibrated_frame_ranges,
    calibrated_views,
    calibrated_whole_view,
    phi4_views,
)
from pyramiddrop.report.token_layout.geometry import View
from pyramiddrop.report.token_layout.grids import (
    molmo_frame_ranges,
    molmo_views,
    newline_grids,
    next_views,
    onevision_views,
    patch_grids,
    patch_grids_in_time,
    pixel_sizes,
    placed_patches,
    placed_patches_in_time,
)
from pyramiddrop.report.token_layout.prompt import CannotPlaceError, FrameRange, Prompt, Size

#: The views of each picture of a prompt.
Views = list[list[View]]

#: The layout of the tokens of pictures, and of videos if it is known.
Layout = tuple[Callable[[Prompt], Views], Callable[[Prompt], list[list[FrameRange]]] | None]

#: Vision towers whose input is a grid of patches of one fixed size.
WITH_CLASS_TOKEN, WITHOUT_CLASS_TOKEN = ("clip_vision_model",), ("siglip_vision_model",)


def views(prompt: Prompt) -> Views:
    """The views of each picture, in the order of their tokens in the prompt.

    Raises:
        CannotPlaceError: if the places of the family's visual tokens are unknown, or unknown under its settings.
        ValueError: if the processor's outputs are needed and missing.
    """
    layout, _ = _layout(prompt, "", "a picture")
    return layout(prompt) if prompt.pictures else []


def frame_ranges(prompt: Prompt) -> list[list[FrameRange]]:
    """The views of each video, in the order of the prompt; raises like :func:`views`."""
    if not prompt.videos:
        return []
    _, layout = _layout(prompt, " of a video", "a frame")
    if layout is None:
        raise _nowhere(prompt, " of a video", "a frame")
    return layout(prompt)


def _layout(prompt: Prompt, where: str, what: str) -> Layout:
    found = LAYOUTS.get(FAMILIES.get(prompt.config.model_type, Family()).layout)
    if found is None:
        raise _nowhere(prompt, where, what)
    return found


def _nowhere(prompt: Prompt, where: str, what: str) -> CannotPlaceError:
    name = prompt.config.model_type
    reason = FAMILIES.get(name, Family()).no_layout or f"nobody has worked out here how it cuts {what}"
    return CannotPlaceError(f"cannot place the visual tokens{where} of model type {name!r}: {reason}")


def _each(one: Callable[[Prompt, Size], list[View]]) -> Callable[[Prompt], Views]:
    """Lay out each picture by its size alone, so that pictures of one size are processed once."""

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


def _each_video(leading: int = 0, trailing: int = 0) -> Callable[[Prompt], list[list[FrameRange]]]:
    return lambda prompt: [calibrated_frame_ranges(prompt, frames, leading, trailing) for frames in prompt.videos]


#: The layouts by their names in `families.py`.
LAYOUTS: dict[str, Layout] = {
    "llava": (_llava, None),
    "one crop": (_of_one_crop, _each_video(leading=1)),  # each frame keeps its class token
    "anyres": (_each(next_views), _each_video()),
    "onevision": (_each(onevision_views), _each_video(trailing=1)),  # one newline token
    "calibrated": (_each(calibrated_views), None),
    "calibrated in time": (_each(calibrated_views), _each_video()),
    "patch grids": (patch_grids, None),
    "patch grids in time": (patch_grids, patch_grids_in_time),
    "newline grids": (newline_grids, None),
    "placed patches": (placed_patches, placed_patches_in_time),
    "pixel sizes": (pixel_sizes, None),
    "molmo": (molmo_views, molmo_frame_ranges),
    "phi4": (phi4_views, None),
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
        processor: the checkpoint's processor.
        pictures: the pictures of one prompt, in its order.
        inputs: the processor's outputs for this prompt alone; families that keep a picture's shape need them.
        videos: the frames of each video, as the model saw them; videos come after the pictures.

    Raises:
        CannotPlaceError: if the places of the family's visual tokens are unknown, or unknown under its settings.
        ValueError: if `inputs` are needed and missing, or belong to other frames.
    """
    prompt = Prompt(config, processor, pictures, inputs or {}, videos)
    return [*_stills(prompt), *_frames(prompt)]


def _stills(prompt: Prompt) -> list[PlacedView]:
    several = len(prompt.pictures) > 1
    return [
        PlacedView(picture, replace(view, name=f"{view.name} {number}") if several else view)
        for number, (picture, own) in enumerate(zip(prompt.pictures, views(prompt), strict=True), start=1)
        for view in own
    ]


def _frames(prompt: Prompt) -> list[PlacedView]:
    several = len(prompt.videos) > 1
    return [
        PlacedView(
            frames[moment.first],
            replace(moment.view, name=moment.name + (f" of video {number}" if several else "")),
            moment.first,
        )
        for number, (frames, own) in enumerate(zip(prompt.videos, frame_ranges(prompt), strict=True), start=1)
        for moment in own
    ]
