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
        inputs: the processor's outputs for this prompt alone; empty if unknown.
        videos: the frames of each video, as the model saw them; videos come after the pictures.
    """

    config: Any
    processor: Any
    pictures: Sequence[Image.Image]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Sequence[Image.Image]] = ()

    def rows(self, name: str, item: str = "picture") -> list[Any]:
        """The rows of `inputs[name]` as lists of numbers, one for each picture, video or frame of a video (`item`)."""
        counts = {"picture": len(self.pictures), "video": len(self.videos), "frame": sum(map(len, self.videos))}
        rows = self.inputs.get(name, None if counts[item] else [])
        if rows is None or len(rows) != counts[item]:
            raise ValueError(
                f"{self.config.model_type} needs the processor's {name}, one row a {item}, to place tokens"
            )
        return [torch.as_tensor(row).tolist() for row in rows]


@dataclass(frozen=True)
class FrameRange:
    """The frames from `first` to `last` (0-based, both included) that one grid of video tokens covers."""

    first: int
    last: int
    view: View
