"""Images that most families' vision towers take: one size, or crops of one size, behind one placeholder id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from zoo.pieces import Piece

IMAGE, VIDEO = 199, 198
START, END, LINE = 197, 196, 195  # around a piece, and between its parts
SIDE = 28  # pixels on a side of what a vision tower sees: 4 x 4 patches
FRAMES = 3
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": SIDE // 4,
}

Maker = Callable[[PreTrainedModel, torch.Generator, int], Piece]


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Pixels."""
    return torch.randn(shape, generator=generator)


def wrapped(count: int, before: list[int], after: list[int], token: int = IMAGE, kind: int = 1) -> Piece:
    """A piece of so many placeholders between other tokens, without tensors as yet."""
    ids = [*before, *[token] * count, *after]
    return Piece(ids, [kind if each == token else 0 for each in ids], {})


def joined(parts: list[Piece]) -> Piece:
    """The tokens of several pieces, one after the other."""
    ids = [each for part in parts for each in part.ids]
    return Piece(ids, [each for part in parts for each in part.types], {})


def square(side: int, count: int, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Maker:
    """Makes images of one size in pixels and in placeholders."""

    def image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
        piece = wrapped(count, [*before], [*after])
        piece.tensors["pixel_values"] = noise(generator, 1, 3, side, side)
        return piece

    return image


def clip(side: int, count: int) -> Maker:
    """Makes videos of a few frames in pixel_values_videos with so many placeholders."""

    def video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
        piece = wrapped(count, [], [], VIDEO, 2)
        piece.tensors["pixel_values_videos"] = noise(generator, 1, FRAMES, 3, side, side)
        return piece.cut([count // FRAMES] * (FRAMES - 1) + [count - count // FRAMES * (FRAMES - 1)])

    return video
