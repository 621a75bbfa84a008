"""The visual part of a prompt, and the error for families whose tokens have no known place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from pyramiddrop.report.token_layout.geometry import View

#: Of a picture in pixels: width and height.
Size = tuple[int, int]


class CannotPlaceError(ValueError):
    """Nobody knows here which part of the picture each visual token of this model is made from."""


@dataclass(frozen=True)
class Prompt:
    """The visual part of one prompt, and what made tokens of it.

    Attributes:
        config: of the model.
        processor: of the checkpoint.
        pictures: in the order of the prompt.
        inputs: what the processor returned for this prompt alone; empty where that is not known.
        videos: the frames of each one, as the model saw them; they stand behind the pictures.
    """

    config: Any
    processor: Any
    pictures: Sequence[Image.Image]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Sequence[Image.Image]] = ()

    def of_pictures(self, name: str) -> list[Any]:
        """The rows of `inputs[name]` as lists of numbers, one a picture.

        Raises:
            ValueError: where the processor's outputs are not those of these pictures.
        """
        return self._per_item(name, len(self.pictures), "picture")

    def of_videos(self, name: str) -> list[Any]:
        """The same, one a video."""
        return self._per_item(name, len(self.videos), "video")

    def of_frames(self, name: str) -> list[Any]:
        """The same, one a frame of any video."""
        return self._per_item(name, sum(map(len, self.videos)), "frame")

    def _per_item(self, name: str, count: int, what: str) -> list[Any]:
        rows = self.inputs.get(name, [] if not count else None)
        if rows is None or len(rows) != count:
            raise ValueError(
                f"{self.config.model_type} needs the processor's {name}, one row a {what}, to place tokens"
            )
        return [torch.as_tensor(row).tolist() for row in rows]


@dataclass(frozen=True)
class FrameRange:
    """What the visual tokens of one time of a video are made from: its frames from `first` to `last`, both from 0."""

    first: int
    last: int
    view: View

    @property
    def name(self) -> str:
        """Frames are counted from 1 for people."""
        return f"frame {self.first + 1}" if self.first == self.last else f"frames {self.first + 1}-{self.last + 1}"
