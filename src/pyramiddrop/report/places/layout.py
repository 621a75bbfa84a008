"""Owns what a model sees of a prompt's pictures and videos: the views that processor and vision tower make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from pyramiddrop.report.places.families import moments, views
from pyramiddrop.report.places.grid import View
from pyramiddrop.report.places.prompt import CannotPlaceError, Prompt

__all__ = ["CannotPlaceError", "Seen", "look"]


@dataclass(frozen=True)
class Seen:
    """A picture, and one view of it. For a video the picture is one frame, and `moment` its number among those seen."""

    picture: Image.Image
    view: View
    moment: int | None = None


def look(
    config: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    inputs: Mapping[str, Any] | None = None,
    videos: Sequence[Sequence[Image.Image]] = (),
) -> list[Seen]:
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


def _stills(prompt: Prompt) -> list[Seen]:
    several = len(prompt.pictures) > 1
    return [
        Seen(picture, replace(view, name=f"{view.name} {number}") if several else view)
        for number, (picture, own) in enumerate(zip(prompt.pictures, views(prompt), strict=True), start=1)
        for view in own
    ]


def _frames(prompt: Prompt) -> list[Seen]:
    several = len(prompt.videos) > 1
    return [
        Seen(
            frames[moment.first],
            replace(moment.view, name=moment.name + (f" of video {number}" if several else "")),
            moment.first,
        )
        for number, (frames, own) in enumerate(zip(prompt.videos, moments(prompt), strict=True), start=1)
        for moment in own
    ]
