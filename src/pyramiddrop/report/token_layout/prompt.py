"""The visual part of a prompt, and the error for tokens without a known place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from pyramiddrop.report.token_layout.geometry import View

#: Width and height of a picture in pixels.
Size = tuple[int, int]


class CannotPlaceError(ValueError):
    """It is unknown which part of the picture each visual token of the model stands for."""


@dataclass(frozen=True)
class Prompt:
    """The visual part of a prompt, with its model and processor.

    Attributes:
        config: the model's configuration.
        processor: the checkpoint's processor.
        pictures: the pictures in the order of the prompt.
        inputs: the processor's outputs for this prompt alone; empty if unknown.
        videos: the frames of each video, as the model saw them; videos come after the pictures.
    """

    config: Any
    processor: Any
    pictures: Sequence[Image.Image]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Sequence[Image.Image]] = ()

    def of_pictures(self, name: str) -> list[Any]:
        """The rows of `inputs[name]` as lists of numbers, one one a picture; ValueError for another number of rows."""
        return self._per_item(name, len(self.pictures), "picture")

    def of_videos(self, name: str) -> list[Any]:
        """The same, one for each video."""
        return self._per_item(name, len(self.videos), "video")

    def of_frames(self, name: str) -> list[Any]:
        """The same, one for each frame of all videos."""
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
    """The frames from `first` to `last` (0-based, both included) that one grid of video tokens covers."""

    first: int
    last: int
    view: View

    @property
    def name(self) -> str:
        """The frames as text, counted from 1."""
        return f"frame {self.first + 1}" if self.first == self.last else f"frames {self.first + 1}-{self.last + 1}"
