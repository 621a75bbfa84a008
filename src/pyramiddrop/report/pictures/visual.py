"""Draw one sample of a prefill: from its trace to a picture, an animation or a page on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pyramiddrop.cost import Cost
from pyramiddrop.inference.request import Run
from pyramiddrop.method_spec import method_label, parse_method_spec
from pyramiddrop.methods import Compose, Downsample, Method
from pyramiddrop.report.pictures import overlay
from pyramiddrop.report.pictures.figure_grid import Stage, draw_contact_sheet, draw_table, save_gif
from pyramiddrop.report.pictures.overlay import Scored
from pyramiddrop.report.token_layout.geometry import Box, Cell, View, cells_by_view, reading_order, unplaced_by_name
from pyramiddrop.report.token_layout.views import CannotPlaceError, PlacedView, place_pictures
from pyramiddrop.report.units import template
from pyramiddrop.trace import Trace

#: Suffixes of pages and animations; all others are matplotlib's.
PAGE, ANIMATION = ".html", ".gif"
#: Height in a notebook, whose cells have any width.
FRAME = "width: 100%; height: 760px; border: 0"
#: Greys of tokens without a known place, and of the empty cells after the last of them.
UNPLACED, EMPTY = (108, 142, 191), (255, 255, 255)


@dataclass(frozen=True)
class StageTokens:
    """The layers from `first` to `last` (0-based, both included) and their visual tokens.

    Attributes:
        tokens: number of visual tokens, including those without a place in the picture.
        cells: for each view of the picture, the places of these tokens.
        unplaced: number of tokens without a place in the picture, by name.
    """

    first: int
    last: int
    tokens: int
    cells: list[frozenset[Cell]]
    unplaced: Mapping[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> str:
        """The layers as text."""
        if self.last < self.first:
            return "before the decoder"
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"


def token_status(layers: Sequence[StageTokens], number: int, view: View) -> list[int]:
    """For each cell of `view` (view number `number`), row by row, the last of the stages in which it is present."""
    return [sum(cell in stage.cells[number] for stage in layers) - 1 for cell in view.grid]


def visual_columns(trace: Trace, sample: int) -> Tensor:
    """The columns of the visual tokens of a sample; ValueError if the trace is empty."""
    if not trace.visual_columns:
        raise ValueError("the trace is empty: run the patched model first")
    return trace.visual_columns[sample]


def stage_tokens(trace: Trace, views: Sequence[View], sample: int = 0) -> list[StageTokens]:
    """The stages between the drops of `trace`: the first has every token, the last the fewest."""
    columns = visual_columns(trace, sample)
    expected = sum(view.tokens for view in views)
    if len(columns) != expected:
        raise ValueError(f"the views have {expected} visual tokens; the trace has {len(columns)}")
    alive = [columns, *(stage.kept[sample] for stage in trace.stages)]
    starts = [0, *(stage.layer for stage in trace.stages)]
    ends = [*(start - 1 for start in starts[1:]), len(trace.lengths) - 1]
    indices = [torch.searchsorted(columns, kept).tolist() for kept in alive]
    return [
        StageTokens(first, last, len(kept), cells_by_view(views, kept), unplaced_by_name(views, kept))
        for first, last, kept in zip(starts, ends, indices, strict=True)
    ]


@dataclass(frozen=True)
class Visual:
    """One sample of a prefill, ready to draw.

    Attributes:
        seen: the pictures and their views, in the order of the prompt.
        stages: the stages, with the tokens of each.
        scored: the scores of the drops that ranked.
        made_by: the model and the method, as text.
        cost: the cost of the whole prefill beside vanilla's, if known.
        note: why tokens are not drawn at their places in the picture; empty if they are.
    """

    seen: list[PlacedView]
    stages: list[StageTokens]
    scored: list[Scored]
    question: str = ""
    answer: str = ""
    made_by: str = ""
    cost: Cost | None = None
    note: str = ""

    def save(self, path: str | Path, scores: bool = False) -> None:
        """Write the kept tokens, or the `scores`, to a file: html (with both), gif, png, pdf, svg, ... by its suffix.

        Raises:
            ValueError: for another suffix, a missing folder, and `scores` if no drop ranked.
        """
        path = Path(path)
        check_picture_path(path, scores)
        if path.suffix.lower() == PAGE:
            path.write_text(self.html(), encoding="utf-8")
        elif path.suffix.lower() == ANIMATION:
            save_gif(self._kept(), [one.moment for one in self.seen], path)
        else:
            (self.draw_scores() if scores else self.draw()).savefig(path, facecolor="white")

    def draw(self) -> Figure:
        """Draw the tokens of each stage, with dropped ones masked (the paper's Figure 5).

        The figure has a row for each view and a column for each stage, or for a video a contact sheet for each stage.
        """
        return self._sheet(self._kept())

    def draw_scores(self) -> Figure:
        """Draw the scores at each drop that ranked: light for high scores, with earlier dropped tokens masked.

        Raises:
            ValueError: if no drop ranked.
        """
        if not self.scored:
            raise ValueError("no scores to draw: no stage of this run ranked a token")
        return self._sheet([self._heat(stage) for stage in self.scored])

    def html(self) -> str:
        """A self-contained page: stages to step through and to play, scores under the pointer."""
        data = {
            "stages": [self._stage_data(number) for number in range(len(self.stages))],
            "views": [self._view_data(number) for number in range(len(self.seen))],
            "ramp": overlay.ramp(),
            "opacity": 1 - overlay.SHOWS_THROUGH,
            "covered": overlay.COVER,
            "seam": overlay.SEAM,
        }
        return template("visual").render(visual=self, data=data)

    def _repr_html_(self) -> str:
        """The page in a frame for notebooks, because it is a document with its own styles and scripts."""
        return f'<iframe srcdoc="{escape(self.html())}" style="{FRAME}"></iframe>'

    def as_dict(self) -> dict[str, Any]:
        """For each stage, the numbers of visual tokens in all, in each view, and without a place."""
        return {
            "views": [{"name": one.view.name, "tokens": one.view.tokens} for one in self.seen],
            "kept": [
                {
                    "layers": [stage.first, stage.last],
                    "tokens": stage.tokens,
                    "placed": dict(zip(self._names, map(len, stage.cells), strict=True)),
                    "unplaced": dict(stage.unplaced),
                }
                for stage in self.stages
            ],
            "note": self.note or None,
        }

    @cached_property
    def pixels(self) -> list[Image.Image]:
        """The pixels of each view."""
        return [overlay.seen_pixels(one.picture, one.view) for one in self.seen]

    @property
    def has_frames(self) -> bool:
        """True if there is a video among the pictures."""
        return any(one.moment is not None for one in self.seen)

    @property
    def _names(self) -> list[str]:
        return [one.view.name for one in self.seen]

    def _sheet(self, stages: list[Stage]) -> Figure:
        draw = draw_contact_sheet if self.has_frames else draw_table
        answer = f"answer: {self.answer}" if self.answer else ""
        return draw(stages, self._names, self.question, " · ".join(filter(None, (answer, self.note))))

    def _kept(self) -> list[Stage]:
        return [
            Stage(f"{stage.layers} · {stage.tokens} tokens", self._panels(overlay.mask_dropped, stage.cells))
            for stage in self.stages
        ]

    def _heat(self, stage: Scored) -> Stage:
        panels = self._panels(partial(overlay.draw_heatmap, tokens=stage.tokens), stage.ranks)
        ticks = [f"{score:.2g}" for score in stage.at((0, 0.25, 0.5, 0.75, 1))]
        return Stage(f"scores before layer {stage.layer}", panels, ticks)

    def _panels(self, paint: Callable[..., Image.Image], of_views: Sequence[Any]) -> list[Image.Image]:
        """Each view, painted by its entry in `of_views`."""
        return [
            overlay.with_seams(paint(pixels, one.view, own), one.view)
            for pixels, one, own in zip(self.pixels, self.seen, of_views, strict=True)
        ]

    def _stage_data(self, number: int) -> dict[str, Any]:
        """A stage; and the layer, tokens, lowest and highest score of the drop after it, if that ranked."""
        stage, after = self.stages[number], self.stages[number + 1 : number + 2]
        ranked = next((one for one in self.scored if after and one.layer == after[0].first), None)
        scores = None
        if ranked is not None:
            low, high = (f"{score:.3g}" for score in ranked.at((0, 1)))
            scores = {"layer": ranked.layer, "tokens": ranked.tokens, "low": low, "high": high}
        whole = self.stages[0].unplaced
        return {
            "layers": stage.layers,
            "first": stage.first,
            "tokens": stage.tokens,
            "unplaced": ", ".join(f"{stage.unplaced.get(name, 0)} of {count} {name}" for name, count in whole.items()),
            "scores": scores,
        }

    def _view_data(self, number: int) -> dict[str, Any]:
        """A view; `tokens`, `status`, and each of `scores` and `ranks` have an entry for each cell."""
        view, pixels = self.seen[number].view, self.pixels[number]
        before = sum(one.view.tokens for one in self.seen[:number])
        numbers = {cell: before + token for token, cell in enumerate(view.cells) if cell is not None}
        return {
            "name": view.name,
            "rows": view.rows,
            "columns": view.columns,
            "seams": view.seams,
            "picture": overlay.picture_data(pixels),
            "width": pixels.width,
            "height": pixels.height,
            "overlay": overlay.overlay_grey(pixels),
            "tokens": [numbers.get(cell) for cell in view.grid],
            "status": token_status(self.stages, number, view),
            "scores": [_flat(stage.scores[number], 4) for stage in self.scored],
            "ranks": [_flat(stage.ranks[number], 0) for stage in self.scored],
            "scored": [stage.layer for stage in self.scored],
        }


def _flat(grid: list[list[float]], digits: int) -> list[float | None]:
    """Flatten row by row and round to `digits` (0: whole numbers); None for NaN, which JSON does not have."""
    values = [value for line in grid for value in line]
    return [None if math.isnan(value) else float(f"{value:.{digits}g}") if digits else int(value) for value in values]


def visualize(
    trace: Trace,
    config: Any,
    processor: Any,
    images: Sequence[Image.Image],
    inputs: Any = None,
    question: str = "",
    answer: str = "",
    made_by: str = "",
    sample: int = 0,
    videos: Sequence[Sequence[Image.Image]] = (),
) -> Visual:
    """Draw the visual tokens of a prefill over its pictures: `visualize(trace, ...).save("kept.html")`.

    If it is unknown which part of a picture a family's tokens stand for, they are drawn as a plain grid in the order of
    the prompt, and `note` says so.

    Args:
        trace: the trace of the prefill.
        config: the model's configuration.
        processor: the checkpoint's processor.
        images: the images of this sample, in the order of the prompt.
        inputs: the processor's outputs for this sample alone; families that keep a picture's shape need them.
        question: the title.
        answer: the line below it; empty for none.
        made_by: the model and the method as text, for the page; empty for none.
        sample: the index of the sample in the batch.
        videos: the frames of each video, as the model saw them; videos come after the images.

    Raises:
        ValueError: if the trace is empty, or the images are not those of the trace.
    """
    tokens, note = len(visual_columns(trace, sample)), ""
    try:
        seen = place_pictures(config, processor, images, inputs, videos)
    except CannotPlaceError as error:
        seen, note = [_unplaced(tokens)], f"{error}: drawn in the order of the prompt"
    views = [one.view for one in seen]
    scored = [Scored(one.layer, views, one.scores[sample]) for one in trace.stages if one.scores is not None]
    cost = trace.cost() if trace.has_sizes else None
    return Visual(seen, stage_tokens(trace, views, sample), scored, question, answer, made_by, cost, note)


def check_picture_path(path: Path, scores: bool = False) -> None:
    """Raise ValueError if no picture can be written to `path`: unknown suffix or missing folder."""
    suffix = path.suffix.lower()
    known = [*sorted(Figure().canvas.get_supported_filetypes()), *([] if scores else [PAGE[1:], ANIMATION[1:]])]
    if scores and suffix in (PAGE, ANIMATION):
        raise ValueError(f"a {suffix[1:]} is no picture of the scores alone; choose one of {', '.join(known)}")
    if suffix[1:] not in known:
        raise ValueError(f"a picture must be one of {', '.join(known)} by its suffix; got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write the picture into")


def check_drawn_method(method: Method | str | None) -> None:
    """Raise ValueError if a method (or its specification) has nothing to draw; None is vanilla."""
    if isinstance(method, str):
        method = parse_method_spec(method)
    if method is None:
        raise ValueError("vanilla keeps every token: there is nothing to draw")
    before = method.parts[0] if isinstance(method, Compose) else method
    if isinstance(before, Downsample):
        raise ValueError("downsample shows the model a smaller picture: its tokens are no patches of this one")


def _unplaced(tokens: int) -> PlacedView:
    """A grid of `tokens` in the order of the prompt, over an empty picture."""
    columns = math.ceil(math.sqrt(tokens * 4 / 3))
    rows = math.ceil(tokens / columns)
    picture = Image.new("RGB", (columns, rows), UNPLACED)
    picture.paste(EMPTY, (tokens - (rows - 1) * columns, rows - 1, columns, rows))
    box, cells = Box(0, 0, columns, rows), reading_order(rows, columns)[:tokens]
    return PlacedView(picture, View("tokens in the order of the prompt", rows, columns, box, cells))


def run_visual(done: Run) -> Visual:
    """The tokens that the run's method kept, ready to draw.

    Raises:
        ValueError: if the method has nothing to draw, such as vanilla.
    """
    check_drawn_method(done.ready.method)
    ready, method, trace = done.ready, done.ready.method, done.trace
    assert method is not None, "vanilla has been refused"
    assert trace is not None, "every method leaves a trace"
    return visualize(
        trace,
        ready.checkpoint.model.config,
        ready.checkpoint.processor,
        ready.pictures,
        ready.inputs,
        ready.request.prompt,
        done.answer,
        f"{ready.request.model or 'the bundled model'} under {method_label(method)}",
        videos=[ready.video.frames] if ready.video else [],
    )
