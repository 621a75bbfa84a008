"""The mean place of kept visual tokens in their pictures: row and column as shares of height and width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from pyramiddrop.methods import Compose, Downsample, Method
from pyramiddrop.report.token_layout.views import PlacedView, place_pictures
from pyramiddrop.trace import Trace


class Place(NamedTuple):
    """A place in a picture, from 0 at its upper or left edge to 1 at its lower or right one."""

    row: float
    column: float


def mean_place(views: Sequence[PlacedView], tokens: Iterable[int]) -> Place | None:
    """The mean place of `tokens`, each at the middle of its cell; None if none of them has a place.

    Args:
        views: the views of one prompt, in the order of its visual tokens.
        tokens: numbers of visual tokens, counted from 0 through all views.
    """
    located = [(seen, cell) for seen in views for cell in seen.view.cells]
    chosen = (located[token] for token in tokens)
    places = [_place(seen, *cell) for seen, cell in chosen if cell is not None]
    return Place(*(sum(axis) / len(places) for axis in zip(*places, strict=True))) if places else None


def _place(seen: PlacedView, row: int, column: int) -> Place:
    box, view, picture = seen.view.box, seen.view, seen.picture
    down = box.top + (row + 0.5) / view.rows * box.height
    across = box.left + (column + 0.5) / view.columns * box.width
    return Place(down / picture.height, across / picture.width)


def batch_views(
    config: Any, processor: Any, pictures: Sequence[Sequence[Image.Image]], inputs: Mapping[str, Any]
) -> list[Sequence[PlacedView]]:
    """The views of each prompt of a batch; none for prompts whose visual tokens have no known place.

    Args:
        pictures: the pictures of each prompt.
        inputs: the processor's outputs for the batch.
    """
    total, start, found = sum(map(len, pictures)), 0, list[Sequence[PlacedView]]()
    rows = {name: value for name, value in inputs.items() if len(value) == total}
    for own in pictures:
        part = {name: value[start : start + len(own)] for name, value in rows.items()}
        try:
            found.append(place_pictures(config, processor, own, part))
        except ValueError:  # CannotPlaceError among them
            found.append(())
        start += len(own)
    return found


def kept_places(trace: Trace, method: Method | None, views: Sequence[Sequence[PlacedView]]) -> list[Place | None]:
    """For each prompt, the mean place of the tokens that its last drop (before an early exit) kept.

    None for tokens without a known place, and for downsampling, whose tokens are different ones.
    """
    parts = method.parts if isinstance(method, Compose) else (method,)
    if any(isinstance(part, Downsample) for part in parts) or not trace.stages:
        return [None] * len(views)
    kept = [stage.kept for stage in trace.stages]
    found: list[Place | None] = []
    for sample, (columns, own) in enumerate(zip(trace.visual_columns, views, strict=True)):
        last = next((one[sample] for one in reversed(kept) if len(one[sample])), columns)
        known = sum(seen.view.tokens for seen in own) == len(columns)
        found.append(mean_place(own, torch.searchsorted(columns, last).tolist()) if known else None)
    return found
