"""Place the visual tokens of a prompt in its pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from pyramiddrop.report.token_layout.geometry import View
from pyramiddrop.report.token_layout.prompt import CannotPlaceError, Prompt
from pyramiddrop.report.token_layout.registry import frame_ranges, views

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
