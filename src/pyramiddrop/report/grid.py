"""Owns the geometry of visual tokens: which rectangle of the picture each one was made from, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyramiddrop.hf.anyres import unpadded

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
    """One look at a picture: `rows` x `columns` visual tokens in reading order, spread evenly over `box`.

    Args:
        leading: tokens before the grid that have no place in the picture (a class token).
        newline: whether each row ends with one token more that has no place in the picture.
    """

    name: str
    rows: int
    columns: int
    box: Box
    leading: int = 0
    newline: bool = False

    @property
    def tokens(self) -> int:
        """How many visual tokens this view puts into the prompt, those without a place among them."""
        return self.leading + self.rows * (self.columns + self.newline)

    def cell(self, token: int) -> Cell | None:
        """The place of the view's `token`-th token; None for a class token or a newline."""
        if not 0 <= token < self.tokens:
            raise ValueError(f"token must be in 0..{self.tokens - 1}; got {token}")
        if token < self.leading:
            return None
        row, column = divmod(token - self.leading, self.columns + self.newline)
        return (row, column) if column < self.columns else None


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


def single_view(width: int, height: int, resized: tuple[int, int], crop: tuple[int, int], patch: int) -> View:
    """LLaVA-1.5: the picture is resized to `resized` and `crop` is cut from its middle, both (height, width)."""
    top, left = (int((full - part) / 2) for full, part in zip(resized, crop, strict=True))
    scale_y, scale_x = height / resized[0], width / resized[1]
    box = Box(left * scale_x, top * scale_y, (left + crop[1]) * scale_x, (top + crop[0]) * scale_y)
    return View("picture", crop[0] // patch, crop[1] // patch, box)


def tiled_views(width: int, height: int, best: tuple[int, int], tile: int, patch: int) -> list[View]:
    """LLaVA-NeXT: the order is the base features, then the high-resolution grid with one newline token a row.

    The base view is the whole picture, squeezed into one square tile. For the other one the picture is fitted into
    `best` (height, width, multiples of `tile`), centred and padded; the tokens of its tiles are put together again to
    one grid, and the rows or columns that are nothing but padding are cut off.
    """
    side = tile // patch
    base = View("base", side, side, Box(0, 0, width, height))
    grid = (best[0] // tile * side, best[1] // tile * side)
    top, left, rows, columns = unpadded(*grid, height, width)
    fitted_height, fitted_width = _fitted(height, width, best)
    pad_y, pad_x = (best[0] - fitted_height) // 2, (best[1] - fitted_width) // 2
    scale_y, scale_x = height / fitted_height, width / fitted_width
    box = Box(
        (left * patch - pad_x) * scale_x,
        (top * patch - pad_y) * scale_y,
        ((left + columns) * patch - pad_x) * scale_x,
        ((top + rows) * patch - pad_y) * scale_y,
    )
    return [base, View("tiles", rows, columns, box, newline=True)]


def shortest_edge_size(width: int, height: int, edge: int) -> tuple[int, int]:
    """The size (height, width) of a picture after its shorter edge was resized to `edge` pixels."""
    longer = int(edge * max(width, height) / min(width, height))
    return (edge, longer) if height <= width else (longer, edge)


def _fitted(height: int, width: int, best: tuple[int, int]) -> tuple[int, int]:
    """The largest size (height, width) of the picture's own shape that fits into `best`."""
    scale_y, scale_x = best[0] / height, best[1] / width
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), best[0]), best[1]
    return best[0], min(math.ceil(width * scale_y), best[1])


def _locate(views: Sequence[View], token: int) -> tuple[int, int]:
    first = 0
    for index, view in enumerate(views):
        if token < first + view.tokens:
            return index, token - first
        first += view.tokens
    raise ValueError(f"token {token} is beyond the {first} visual tokens of the picture's views")
