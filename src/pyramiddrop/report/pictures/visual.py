"""Everything drawn of one sample of a prefill: from its trace to a picture, an animation or a page on disk."""

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
from pyramiddrop.report.pictures.heatmap import COLOURS, Scored, draw_heatmap
from pyramiddrop.report.pictures.lifetimes import StageTokens, stage_tokens, visual_columns
from pyramiddrop.report.pictures.overlay import mask_dropped, seen_pixels, with_seams
from pyramiddrop.report.token_layout.geometry import Box, View, reading_order
from pyramiddrop.report.token_layout.views import CannotPlaceError, PlacedView, place_pictures
from pyramiddrop.trace import Trace

#: What a page and an animation have for a suffix; every other one is matplotlib's.
PAGE, ANIMATION = ".html", ".gif"
#: A notebook's cell is as wide as it likes.
FRAME = "width: 100%; height: 760px; border: 0"
#: Tokens without a known place, and the empty cells behind the last of them.
UNPLACED, EMPTY = (108, 142, 191), (255, 255, 255)


@dataclass(frozen=True)
class Visual:
    """Everything that is drawn of one sample of a prefill.

    Attributes:
        seen: the pictures and the views of them, in the order of the prompt.
        stages: of layers, with the tokens alive in each.
        scored: the drops that ranked.
        made_by: the model and the method, in words.
        cost: of the whole prefill against vanilla, where it is known.
        note: why the tokens are not drawn where they lie in the picture; empty where they are.
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
        """Write what was kept, or the `scores`; the suffix chooses html (it has both), gif, or png, pdf, svg, ...

        Raises:
            ValueError: for another suffix, a folder that is not there, and `scores` where no stage ranked a token.
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
        """The tokens alive in each stage; places of dropped ones are veiled (the paper's Figure 5).

        One row a view and one column a stage; of a video a contact sheet for each stage.
        """
        return self._sheet(self._kept())

    def draw_scores(self) -> Figure:
        """The scores at each drop that ranked: light is high, tokens that were gone are veiled.

        Raises:
            ValueError: where no stage ranked a token.
        """
        if not self.scored:
            raise ValueError("no scores to draw: no stage of this run ranked a token")
        return self._sheet([self._heat(stage) for stage in self.scored])

    def html(self) -> str:
        """One page without a network: stages to step through and to play, scores under the pointer."""
        return page.render(self)

    def _repr_html_(self) -> str:
        """The page in a notebook: in a frame of its own, for it brings a document with styles and scripts."""
        return f'<iframe srcdoc="{escape(self.html())}" style="{FRAME}"></iframe>'

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: for each stage the visual tokens alive, how many of them in each view, and without a
        place in any of them."""
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
        """Each view's part of its picture."""
        return [seen_pixels(one.picture, one.view) for one in self.seen]

    @property
    def has_frames(self) -> bool:
        """Whether there is a video among the pictures."""
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
    """Place the visual tokens of a prefill in its pictures: `visualize(trace, ...).save("kept.html")`.

    Where nobody knows which part of a picture a family's tokens are made from, they are drawn as a plain grid in the
    order of the prompt, and `note` says so.

    Args:
        trace: of the prefill.
        config: the model's configuration.
        processor: the checkpoint's processor.
        images: of this sample, in the order of the prompt.
        inputs: what the processor returned for this sample alone; families that keep a picture's shape need it.
        question: written above.
        answer: written under the question; empty for none.
        made_by: the model and the method in words, for the page; empty for none.
        sample: which one of the batch.
        videos: the frames of each one, as the model saw them; they stand behind the images.

    Raises:
        ValueError: for an empty trace, and images that are not this trace's.
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
    """Raise ValueError where no picture can be written to `path`, by its suffix or for want of its folder."""
    suffix = path.suffix.lower()
    known = [*sorted(Figure().canvas.get_supported_filetypes()), *([] if scores else [PAGE[1:], ANIMATION[1:]])]
    if scores and suffix in (PAGE, ANIMATION):
        raise ValueError(f"a {suffix[1:]} is no picture of the scores alone; choose one of {', '.join(known)}")
    if suffix[1:] not in known:
        raise ValueError(f"a picture must be one of {', '.join(known)} by its suffix; got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write the picture into")


def check_drawn_method(method: Method | str | None) -> None:
    """Raise ValueError if there is nothing to draw of a method, which may be given in words; None is vanilla."""
    if isinstance(method, str):
        method = parse_method_spec(method)
    if method is None:
        raise ValueError("vanilla keeps every token: there is nothing to draw")
    before = method.parts[0] if isinstance(method, Compose) else method
    if isinstance(before, Downsample):
        raise ValueError("downsample shows the model a smaller picture: its tokens are no patches of this one")


def _unplaced(tokens: int) -> PlacedView:
    """A grid of so many tokens in the order of the prompt, over a picture that shows nothing."""
    columns = math.ceil(math.sqrt(tokens * 4 / 3))
    rows = math.ceil(tokens / columns)
    picture = Image.new("RGB", (columns, rows), UNPLACED)
    picture.paste(EMPTY, (tokens - (rows - 1) * columns, rows - 1, columns, rows))
    cells = reading_order(rows, columns)[:tokens]
    return PlacedView(
        picture, View("tokens in the order of the prompt", rows, columns, Box(0, 0, columns, rows), cells)
    )


def run_visual(done: Run) -> Visual:
    """What the run's method kept of its pictures.

    Raises:
        ValueError: where its method is none of which anything could be drawn, vanilla for one.
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
