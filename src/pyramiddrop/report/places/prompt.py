"""Owns what is known of a prompt whose visual tokens are placed, and the error for those that have no known place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


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
    """

    config: Any
    processor: Any
    pictures: Sequence[Image.Image]
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def told(self, name: str) -> list[list[int]]:
        """The rows of `inputs[name]`, one a picture.

        Raises:
            ValueError: where the processor's outputs are not those of these pictures.
        """
        rows = self.inputs.get(name)
        if rows is None or len(rows) != len(self.pictures):
            raise ValueError(
                f"{self.config.model_type} needs the processor's {name}, one row a picture, to place tokens"
            )
        return [[int(value) for value in row] for row in rows]
