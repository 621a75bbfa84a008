"""Write the demo's files: a self-contained HTML page, and an overlay picture for each question."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyramiddrop.inference.demo import Asked, Demo
from pyramiddrop.report.pictures.lifetimes import StageTokens, token_status
from pyramiddrop.report.pictures.overlay import overlay_grey, picture_data, seen_pixels
from pyramiddrop.report.pictures.visual import Visual, visualize
from pyramiddrop.report.tables import runs
from pyramiddrop.report.token_layout.geometry import Cell, View
from pyramiddrop.report.token_layout.views import PlacedView
from pyramiddrop.report.units import template

README_ONLINE = "https://github.com/pyramiddrop/pyramiddrop#readme"


@dataclass(frozen=True)
class Written:
    """The paths of the demo's files."""

    page: Path
    overlays: list[Path]


def write_demo(demo: Demo, folder: Path) -> Written:
    """Write `index.html` and `overlay-N-KIND.png` for each question into the existing `folder`."""
    visuals = [_visual(demo, asked) for asked in demo.asked]
    overlays = []
    for number, (asked, visual) in enumerate(zip(demo.asked, visuals, strict=True), start=1):
        overlays.append(folder / f"overlay-{number}-{asked.question.kind}.png")
        visual.save(overlays[-1])
    cards = [Card(asked, visual.seen, visual.stages) for asked, visual in zip(demo.asked, visuals, strict=True)]
    page = folder / "index.html"
    page.write_text(render_page(demo, cards, readme_link(folder)), encoding="utf-8")
    return Written(page, overlays)


def _visual(demo: Demo, asked: Asked) -> Visual:
    pruned, vanilla = asked.comparison.pruned.answer, asked.comparison.vanilla.answer
    return visualize(
        asked.comparison.trace,
        demo.checkpoint.model.config,
        demo.checkpoint.processor,
        [asked.picture],
        question=asked.question.question,
        answer=f"{pruned} · vanilla: {vanilla} · true: {asked.question.answer}",
    )


@dataclass(frozen=True)
class Card:
    """One question on the page: the answers, the views of its picture, and the remaining tokens of each stage."""

    asked: Asked
    seen: Sequence[PlacedView]
    stages: Sequence[StageTokens]

    @property
    def picture(self) -> str:
        """The id of the question's picture on the page."""
        return self.asked.question.image.stem

    @cached_property
    def panels(self) -> list[dict[str, Any]]:
        """For each stage its layers, and an SVG path over the dropped patches of the picture's first view."""
        view = self.seen[0].view
        return [
            {"layers": stage.layers, "tokens": stage.tokens, "dropped": dropped_path(view, stage.cells[0])}
            for stage in self.stages
        ]

    @property
    def view(self) -> View:
        """The grid of the first view."""
        return self.seen[0].view

    @property
    def token_status(self) -> list[int]:
        """For each patch, in reading order, the last stage in which it is present."""
        return token_status(self.stages, 0, self.view)


def readme_link(folder: Path, source: Path = Path(__file__).parents[3]) -> str:
    """The link from a page in `folder` to the README in the source tree, or else to the project's page."""
    readme = source / "README.md"
    return os.path.relpath(readme, folder) if readme.is_file() else README_ONLINE


def render_page(demo: Demo, cards: Sequence[Card], readme: str) -> str:
    """The page as HTML text; `readme` is the target of its link to the README."""
    return template("demo").render(
        demo=demo,
        cards=cards,
        pictures={card.picture: picture_data(seen_pixels(card.seen[0].picture, card.view)) for card in cards},
        dark_pictures={card.picture: overlay_grey(card.asked.picture) > 128 for card in cards},
        ratios={name: after / before if before else 1.0 for name, (before, after) in _medians(demo).items()},
        medians=_medians(demo),
        pyramid=cards[0].stages,
        right=[sum(right) for right in zip(*demo.right, strict=True)],
        remarks=runs.summary(demo),
        own_model=runs.OWN_MODEL,
        readme=readme,
    )


def dropped_path(view: View, kept: frozenset[Cell]) -> str:
    """An SVG path, in units of patches, that covers every patch that is not `kept`."""
    return "".join(f"M{column} {row}h1v1h-1z" for row, column in view.grid if (row, column) not in kept)


def _medians(demo: Demo) -> dict[str, tuple[float, float]]:
    return {
        "flops": demo.medians(lambda one: one.usage.flops),
        "kv": demo.medians(lambda one: one.usage.kv_bytes),
        "wall": demo.medians(lambda one: one.prefill.wall),
        "cpu": demo.medians(lambda one: one.prefill.cpu),
    }
