"""Draw one sample of a prefill: from its trace to a picture, an animation or a page on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from pyramiddrop.cost import Cost
from pyramiddrop.inference.request import Run
from pyramiddrop.method_spec import method_label, parse_method_spec
from pyramiddrop.methods import Compose, Downsample, Method
from pyramiddrop.report.pictures import animation as animation
from pyramiddrop.report.pictures import page
from pyramiddrop.report.pictures.figure_grid import Scale, Stage, draw_contact_sheet, draw_table
from pyramiddrop.report.pictures.lifetimes import StageTokens, stage_tokens, visual_columns
from pyramiddrop.report.pictures.overlay import COLOURS, Scored, draw_heatmap, mask_dropped, seen_pixels, with_seams
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.views import CannotPlaceError, PlacedView, place_pictures
from pyramiddrop.trace import Trace

#: Suffixes of pages and animations; all others are matplotlib's.
PAGE, ANIMATION = ".html", ".gif"
#: Height in a notebook, whose cells have any width.
FRAME = "width: 100%; height: 760px; border: 0"
#: Greys of tokens without a known place, and of the empty cells after the last of them.
UNPLACED, EMPTY = (108, 142, 191), (255, 255, 255)


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
            self._animate(path)
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
        return page.render(self)

    def _repr_html_(self) -> str:
        """The page in a frame for notebooks, because it is a document with its own styles and scripts."""
        return f'<iframe srcdoc="{escape(self.html())}" style="{FRAME}"></iframe>'

    def as_dict(self) -> dict[str, Any]:
        """For each stage, the numbers of visual tokens in all, in each view, and without a place."""
        names = [one.view.name for one in self.seen]
        return {
            "views": [{"name": one.view.name, "tokens": one.view.tokens} for one in self.seen],
            "kept": [
                {
                    "layers": [stage.first, stage.last],
                    "tokens": stage.tokens,
                    "placed": {name: len(cells) for name, cells in zip(names, stage.cells, strict=True)},
                    "unplaced": dict(stage.unplaced),
                }
                for stage in self.stages
            ],
            "note": self.note or None,
        }

    @cached_property
    def pixels(self) -> list[Image.Image]:
        """The pixels of each view."""
        return [seen_pixels(one.picture, one.view) for one in self.seen]

    @property
    def has_frames(self) -> bool:
        """True if there is a video among the pictures."""
        return any(one.moment is not None for one in self.seen)

    def _sheet(self, stages: list[Stage]) -> Figure:
        names = [one.view.name for one in self.seen]
        draw = draw_contact_sheet if self.has_frames else draw_table
        answer = f"answer: {self.answer}" if self.answer else ""
        return draw(stages, names, self.question, " · ".join(filter(None, (answer, self.note))))

    def _kept(self) -> list[Stage]:
        return [
            Stage(
                f"{stage.layers} · {stage.tokens} tokens",
                [
                    with_seams(mask_dropped(part, one.view, cells), one.view)
                    for part, one, cells in zip(self.pixels, self.seen, stage.cells, strict=True)
                ],
            )
            for stage in self.stages
        ]

    def _heat(self, stage: Scored) -> Stage:
        panels = [
            with_seams(draw_heatmap(part, one.view, ranks, stage.tokens), one.view)
            for part, one, ranks in zip(self.pixels, self.seen, stage.ranks, strict=True)
        ]
        ticks = [f"{score:.2g}" for score in stage.at((0, 0.25, 0.5, 0.75, 1))]
        return Stage(f"scores before layer {stage.layer}", panels, Scale(COLOURS, ticks))

    def _animate(self, path: Path) -> None:
        if self.has_frames:
            animation.play(self._kept(), [one.moment for one in self.seen], path)
        else:
            animation.step_through(self._kept(), path)


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
    ranked = [(stage.layer, stage.scores) for stage in trace.stages]
    scored = [Scored(layer, views, scores[sample]) for layer, scores in ranked if scores is not None]
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
    cells = reading_order(rows, columns)[:tokens]
    return PlacedView(
        picture, View("tokens in the order of the prompt", rows, columns, Box(0, 0, columns, rows), cells)
    )


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
