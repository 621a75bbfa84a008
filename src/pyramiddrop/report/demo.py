"""Owns the files that the demo leaves: the page, and one overlay a question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyramiddrop.inference.demo import Asked, Demo
from pyramiddrop.report.demo_page import Card, render_page
from pyramiddrop.report.pictures.visual import Visual, visualize


@dataclass(frozen=True)
class Written:
    """Where the demo's files are."""

    page: Path
    overlays: list[Path]


def write_demo(demo: Demo, folder: Path) -> Written:
    """Write `index.html` and `overlay-N-KIND.png` for each question into `folder`, which is there already."""
    visuals = [_visual(demo, asked) for asked in demo.asked]
    overlays = []
    for number, (asked, visual) in enumerate(zip(demo.asked, visuals, strict=True), start=1):
        overlays.append(folder / f"overlay-{number}-{asked.question.kind}.png")
        visual.save(overlays[-1])
    cards = [Card(asked, visual.seen, visual.spans) for asked, visual in zip(demo.asked, visuals, strict=True)]
    page = folder / "index.html"
    page.write_text(render_page(demo, cards), encoding="utf-8")
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
