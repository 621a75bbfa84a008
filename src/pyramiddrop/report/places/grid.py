"""Owns the geometry of visual tokens: which rectangle of the picture each one was made from, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: A place in a grid of visual tokens: row and column, both from 0.
Cell = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the picture. It may stick out where a model pads; the padding is black."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True)
class View:
    """One look at a picture: a grid of `rows` x `columns` visual tokens that is spread evenly over `box`.

    Args:
        cells: the place of each token in the order of the prompt, None for one that has no place in the picture; an
            empty tuple for reading order. See :func:`reading_order` and :func:`crop_order`.
        seams: the rows and the columns at which another crop of the picture begins.
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
        """How many visual tokens this view puts into the prompt, those without a place among them."""
        return len(self.cells)

    @property
    def places(self) -> frozenset[Cell]:
        """The cells of the grid that have a token."""
        return frozenset(cell for cell in self.cells if cell is not None)

    def cell(self, token: int) -> Cell | None:
        """The place of the view's `token`-th token; None for one that has none."""
        if not 0 <= token < self.tokens:
            raise ValueError(f"token must be in 0..{self.tokens - 1}; got {token}")
        return self.cells[token]


def reading_order(rows: int, columns: int, leading: int = 0, newline: bool = False) -> tuple[Cell | None, ...]:
    """Row after row. `leading` tokens without a place (a class token) stand before, and a `newline` behind each row."""
    grid = [[*((row, column) for column in range(columns)), *[None] * newline] for row in range(rows)]
    return (*[None] * leading, *(cell for line in grid for cell in line))


def crop_order(crops: tuple[int, int], rows: int, columns: int) -> tuple[Cell | None, ...]:
    """Crop after crop, of which there are (down, across): each one's `rows` x `columns` tokens in reading order."""
    return tuple(
        (down * rows + row, across * columns + column)
        for down in range(crops[0])
        for across in range(crops[1])
        for row in range(rows)
        for column in range(columns)
    )


def cells_by_view(views: Sequence[View], tokens: Iterable[int]) -> list[frozenset[Cell]]:
    """The places of `tokens`, which are numbered through all `views`, one after the other.

    Raises:
        ValueError: for a token that lies beyond the last view.
    """
    places: list[set[Cell]] = [set() for _ in views]
    for token in tokens:
        index, within = _locate(views, token)
        cell = views[index].cell(within)
        if cell is not None:
            places[index].add(cell)
    return [frozenset(cells) for cells in places]


def values_by_view(views: Sequence[View], values: Sequence[float]) -> list[list[list[float]]]:
    """For each view its rows of `values`, of which there is one a token through all `views`.

    Raises:
        ValueError: where there are more or fewer values than tokens.
    """
    expected = sum(view.tokens for view in views)
    if len(values) != expected:
        raise ValueError(f"the views have {expected} visual tokens; there are {len(values)} values")
    grids = [[[math.nan] * view.columns for _ in range(view.rows)] for view in views]
    for token, value in enumerate(values):
        index, within = _locate(views, token)
        cell = views[index].cell(within)
        if cell is not None:
            grids[index][cell[0]][cell[1]] = value
    return grids


def _locate(views: Sequence[View], token: int) -> tuple[int, int]:
    first = 0
    for index, view in enumerate(views):
        if token < first + view.tokens:
            return index, token - first
        first += view.tokens
    raise ValueError(f"token {token} is beyond the {first} visual tokens of the picture's views")
