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
    """A picture, and one view of it. For a video the picture is one frame, and `moment` its number among those seen."""

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
    """All views of all pictures and videos, in the order in which their tokens stand in the prompt.

    Args:
        config: the model's configuration; `config.model_type` says which family it is.
        processor: the checkpoint's processor.
        pictures: those of one prompt, in its order.
        inputs: what the processor returned for this prompt alone; families that keep a picture's shape need it.
        videos: the frames of each one, as the model saw them; they stand behind the pictures.

    Raises:
        CannotPlaceError: for a family, or a setting of it, whose visual tokens have no known place.
        ValueError: for such a family without its `inputs`, or where these are of other frames.
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
