"""Owns what a model sees of a prompt's pictures: the views that its processor and its vision tower make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from pyramiddrop.report.grid import View
from pyramiddrop.report.places.families import views
from pyramiddrop.report.places.prompt import CannotPlaceError, Prompt

__all__ = ["CannotPlaceError", "Seen", "look"]


@dataclass(frozen=True)
class Seen:
    """A picture, and one view of it. For a video the picture is one frame, and `moment` its number among those seen."""

    picture: Image.Image
    view: View
    moment: int | None = None


def look(
    config: Any, processor: Any, pictures: Sequence[Image.Image], inputs: Mapping[str, Any] | None = None
) -> list[Seen]:
    """All views of all pictures, in the order in which their tokens stand in the prompt.

    Args:
        config: the model's configuration; `config.model_type` says which family it is.
        processor: the checkpoint's processor.
        pictures: those of one prompt, in its order.
        inputs: what the processor returned for this prompt alone; families that keep a picture's shape need it.

    Raises:
        CannotPlaceError: for a family, or a setting of it, whose visual tokens have no known place.
        ValueError: for such a family without its `inputs`.
    """
    found = views(Prompt(config, processor, pictures, inputs or {}))
    return [
        Seen(picture, replace(view, name=f"{view.name} {number}") if len(pictures) > 1 else view)
        for number, (picture, own) in enumerate(zip(pictures, found, strict=True), start=1)
        for view in own
    ]
