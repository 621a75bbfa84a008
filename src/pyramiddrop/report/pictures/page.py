"""The HTML page of one prefill: stages to step through and to play, the status and the scores of each token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pyramiddrop.report.pictures.lifetimes import token_status
from pyramiddrop.report.pictures.overlay import COVER, SEAM, SHOWS_THROUGH, overlay_grey, picture_data, ramp
from pyramiddrop.report.units import template

if TYPE_CHECKING:
    from pyramiddrop.report.pictures.visual import Visual


def render(visual: Visual) -> str:
    """The page as HTML text; it needs no network."""
    data = {
        "stages": [_stage(visual, number) for number in range(len(visual.stages))],
        "views": [_view(visual, number) for number in range(len(visual.seen))],
        "ramp": ramp(),
        "opacity": 1 - SHOWS_THROUGH,
        "covered": COVER,
        "seam": SEAM,
    }
    return template("visual").render(visual=visual, data=data)


def _stage(visual: Visual, number: int) -> dict[str, Any]:
    """A stage; and the layer, tokens, lowest and highest score of the drop after it, if that ranked."""
    stage, after = visual.stages[number], visual.stages[number + 1 : number + 2]
    ranked = next((one for one in visual.scored if after and one.layer == after[0].first), None)
    scores = None
    if ranked is not None:
        low, high = (f"{score:.3g}" for score in ranked.at((0, 1)))
        scores = {"layer": ranked.layer, "tokens": ranked.tokens, "low": low, "high": high}
    whole = visual.stages[0].unplaced
    unplaced = ", ".join(f"{stage.unplaced.get(name, 0)} of {count} {name}" for name, count in whole.items())
    return {
        "layers": stage.layers,
        "first": stage.first,
        "tokens": stage.tokens,
        "unplaced": unplaced,
        "scores": scores,
    }


def _view(visual: Visual, number: int) -> dict[str, Any]:
    """The data of a view; `tokens`, `status`, and each of `scores` and `ranks` have an entry for each cell."""
    view, pixels = visual.seen[number].view, visual.pixels[number]
    before = sum(one.view.tokens for one in visual.seen[:number])
    numbers = {cell: before + token for token, cell in enumerate(view.cells) if cell is not None}
    return {
        "name": view.name,
        "rows": view.rows,
        "columns": view.columns,
        "seams": view.seams,
        "picture": picture_data(pixels),
        "width": pixels.width,
        "height": pixels.height,
        "overlay": overlay_grey(pixels),
        "tokens": [numbers.get(cell) for cell in view.grid],
        "status": token_status(visual.stages, number, view),
        "scores": [_flat(stage.scores[number], 4) for stage in visual.scored],
        "ranks": [_flat(stage.ranks[number], 0) for stage in visual.scored],
        "scored": [stage.layer for stage in visual.scored],
    }


def _flat(grid: list[list[float]], digits: int) -> list[float | None]:
    """Flatten row by row and round to `digits` (0: whole numbers); None for NaN, which JSON does not have."""
    values = [value for line in grid for value in line]
    return [None if math.isnan(value) else float(f"{value:.{digits}g}") if digits else int(value) for value in values]
