"""Owns the pictures of one prefill: what each stage kept and how it scored, drawn from a trace into files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from pyramiddrop.report.grid import values_by_view
from pyramiddrop.report.heat import heat, score_range
from pyramiddrop.report.layout import Seen, look
from pyramiddrop.report.overlay import (
    check_overlay_path,
    dim_dropped,
    draw_overlay,
    draw_panels,
    save_overlay,
    seen_pixels,
)
from pyramiddrop.report.spans import Span, spans
from pyramiddrop.trace import Trace

#: How long a GIF shows each span of layers, in milliseconds.
FRAME = 900


@dataclass(frozen=True)
class Scored:
    """The scores of one stage end: before `layer`, for each view its rows of scores, NaN where a token was gone."""

    layer: int
    grids: list[list[list[float]]]


@dataclass(frozen=True)
class Visual:
    """Everything that is drawn of one sample of a prefill."""

    seen: list[Seen]
    spans: list[Span]
    scored: list[Scored]
    question: str
    answer: str

    def save(self, path: str | Path, scores: bool = False) -> None:
        """Write a picture of the kept tokens, or of the `scores`; the suffix chooses png, pdf, svg, ..., or gif.

        Raises:
            ValueError: for another suffix, a folder that is not there, and `scores` where no stage ranked a token.
        """
        path = Path(path)
        check_picture_path(path, scores)
        if path.suffix.lower() == ".gif":
            self._animate(path)
        else:
            save_overlay(self.draw_scores() if scores else self.draw(), path)

    def draw(self) -> Figure:
        """One row a view, one column a span of layers; dropped tokens are veiled (the paper's Figure 5)."""
        return draw_overlay(self.seen, self.spans, self.question, self._subtitle)

    def draw_scores(self) -> Figure:
        """One row a view, one column a stage end that ranked; light is high, tokens that were gone are veiled.

        Raises:
            ValueError: where no stage ranked a token.
        """
        if not self.scored:
            raise ValueError("no scores to draw: no stage of this run ranked a token")
        scales = [score_range(stage.grids) for stage in self.scored]
        rows = []
        for row, one in enumerate(self.seen):
            pixels = seen_pixels(one.picture, one.view)
            pairs = zip(self.scored, scales, strict=True)
            rows.append([heat(pixels, one.view, stage.grids[row], scale) for stage, scale in pairs])
        heads = [f"scores before layer {stage.layer}" for stage in self.scored]
        return draw_panels(self.seen, heads, rows, self.question, self._subtitle)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: for each span of layers the visual tokens alive, and how many of them in each view."""
        names = [one.view.name for one in self.seen]
        return {
            "views": [{"name": one.view.name, "tokens": one.view.tokens} for one in self.seen],
            "kept": [
                {
                    "layers": [span.first, span.last],
                    "tokens": span.tokens,
                    "placed": {name: len(cells) for name, cells in zip(names, span.cells, strict=True)},
                }
                for span in self.spans
            ],
        }

    @property
    def _subtitle(self) -> str:
        return f"answer: {self.answer}" if self.answer else ""

    def _animate(self, path: Path) -> None:
        pixels = [seen_pixels(one.picture, one.view) for one in self.seen]
        frames = []
        for span in self.spans:
            views = zip(pixels, self.seen, span.cells, strict=True)
            frames.append(_stacked([dim_dropped(part, one.view, cells) for part, one, cells in views]))
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME, loop=0)


def visualize(
    trace: Trace,
    config: Any,
    processor: Any,
    images: Sequence[Image.Image],
    inputs: Any = None,
    question: str = "",
    answer: str = "",
    sample: int = 0,
) -> Visual:
    """Place the visual tokens of a prefill in its pictures: `visualize(trace, ...).save("kept.png")`.

    Args:
        trace: of the prefill.
        config: the model's configuration.
        processor: the checkpoint's processor.
        images: of this sample, in the order of the prompt.
        inputs: what the processor returned for this sample alone; families of dynamic resolution need its
            `image_grid_thw`.
        question: written above the panels.
        answer: written under the question; empty for none.
        sample: which one of the batch.

    Raises:
        ValueError: for a family whose tokens cannot be placed, an empty trace, and images that are not this trace's.
    """
    grids = None if inputs is None else inputs.get("image_grid_thw")
    seen = look(config, processor.image_processor, images, grids)
    views = [one.view for one in seen]
    layers = spans(trace, views, sample)
    ranked = [(stage.layer, stage.scores) for stage in trace.stages]
    scored = [
        Scored(layer, values_by_view(views, scores[sample].tolist())) for layer, scores in ranked if scores is not None
    ]
    return Visual(seen, layers, scored, question, answer)


def check_picture_path(path: Path, scores: bool = False) -> None:
    """Raise ValueError where no picture can be written to `path`, by its suffix or for want of its folder."""
    if path.suffix.lower() != ".gif":
        check_overlay_path(path)
    elif scores:
        raise ValueError("a gif shows the kept tokens, not the scores; write the scores as png, svg or pdf")
    elif not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write the picture into")


def _stacked(parts: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    width = max(part.width for part in parts)
    whole = Image.new("RGB", (width, sum(part.height + gap for part in parts) - gap), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + gap
    return whole
