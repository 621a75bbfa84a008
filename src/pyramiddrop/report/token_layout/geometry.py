"""Geometry of visual tokens in plain numbers: views, grids and boxes; and the prompt whose tokens are placed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from PIL import Image

#: A place in a grid of visual tokens: row and column, from 0.
Cell = tuple[int, int]
#: Width and height of a picture in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the picture. It may exceed the picture where a model pads; padding is black."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Width in pixels of the picture."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Height in pixels of the picture."""
        return self.bottom - self.top


@dataclass(frozen=True)
class View:
    """A view of a picture: a grid of `rows` x `columns` visual tokens spread evenly over `box`.

    Args:
        cells: the place of each token in the order of the prompt, None for tokens without a place in the picture; an
            empty tuple for reading order. See :func:`reading_order` and :func:`crop_order`.
        seams: the rows and columns at which another crop of the picture begins.
    """

    name: str
    rows: int
    columns: int
    box: Box
    cells: tuple[Cell | None, ...] = ()
    seams: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def __post_init__(self) -> None:
        if not self.cells:
            object.__setattr__(self, "cells", reading_order(self.rows, self.columns))

    @property
    def tokens(self) -> int:
        """The number of visual tokens of this view in the prompt, including those without a place."""
        return len(self.cells)

    @property
    def grid(self) -> list[Cell]:
        """All cells, row by row."""
        return list(product(range(self.rows), range(self.columns)))

    @property
    def places(self) -> frozenset[Cell]:
        """The cells of the grid that have a token."""
        return frozenset(cell for cell in self.cells if cell is not None)

    def unplaced_name(self, token: int) -> str:
        """The name of the view's `token`-th token, which has no place, by its position among the others."""
        before = [cell for cell in self.cells[:token] if cell is not None]
        if not before:
            return "start tokens"
        return "row ends" if before[-1][1] == self.columns - 1 else "others"

    def cell(self, token: int) -> Cell | None:
        """The place of the view's `token`-th token, or None."""
        if not 0 <= token < self.tokens:
            raise ValueError(f"token must be in 0..{self.tokens - 1}; got {token}")
        return self.cells[token]


def reading_order(rows: int, columns: int, leading: int = 0, newline: bool = False) -> tuple[Cell | None, ...]:
    """Row by row, after `leading` tokens without a place (a class token), with a `newline` after each row."""
    lines = [(*product([row], range(columns)), *[None] * newline) for row in range(rows)]
    return (*[None] * leading, *chain.from_iterable(lines))


def crop_order(crops: tuple[int, int], rows: int, columns: int) -> tuple[Cell | None, ...]:
    """Crop by crop, of which there are (down, across), each with `rows` x `columns` tokens in reading order."""
    places = product(range(crops[0]), range(crops[1]), range(rows), range(columns))
    return tuple((down * rows + row, across * columns + column) for down, across, row, column in places)


def cells_by_view(views: Sequence[View], tokens: Iterable[int]) -> list[frozenset[Cell]]:
    """The places of `tokens`, numbered through all `views`, in each view."""
    located, places = _located(views), [set[Cell]() for _ in views]
    for token in tokens:
        if not 0 <= token < len(located):
            raise ValueError(f"token {token} is beyond the {len(located)} visual tokens of the picture's views")
        index, cell = located[token]
        if cell is not None:
            places[index].add(cell)
    return [frozenset(cells) for cells in places]


def unplaced_by_name(views: Sequence[View], tokens: Iterable[int]) -> dict[str, int]:
    """The number of `tokens`, numbered through all `views`, without a place in the picture, by name."""
    located = [(view, number) for view in views for number in range(view.tokens)]
    chosen = (located[token] for token in tokens)
    return dict(Counter(view.unplaced_name(number) for view, number in chosen if view.cells[number] is None))


def values_by_view(views: Sequence[View], values: Sequence[float]) -> list[list[list[float]]]:
    """Split `values`, one for each token through all `views`, into the rows of each view."""
    located = _located(views)
    if len(values) != len(located):
        raise ValueError(f"the views have {len(located)} visual tokens; there are {len(values)} values")
    grids = [[[math.nan] * view.columns for _ in range(view.rows)] for view in views]
    for (index, cell), value in zip(located, values, strict=True):
        if cell is not None:
            grids[index][cell[0]][cell[1]] = value
    return grids


def _located(views: Sequence[View]) -> list[tuple[int, Cell | None]]:
    """The number of the view and the place of each token through all `views`."""
    return [(index, cell) for index, view in enumerate(views) for cell in view.cells]


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
    inputs: Mapping[str, Any]
    videos: Sequence[Sequence[Image.Image]]

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
