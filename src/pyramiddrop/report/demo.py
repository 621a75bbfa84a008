"""Owns the files that the demo leaves: the page, and one overlay a question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyramiddrop.inference.demo import Asked, Demo
from pyramiddrop.report.page import Card, render_page
from pyramiddrop.report.run_overlay import kept_views, write_overlay


@dataclass(frozen=True)
class Written:
    """Where the demo's files are."""

    page: Path
    overlays: list[Path]


def write_demo(demo: Demo, folder: Path) -> Written:
    """Write `index.html` and `overlay-N-KIND.png` for each question into `folder`, which is there already."""
    overlays = [_write_overlay(demo, asked, folder, number) for number, asked in enumerate(demo.asked, start=1)]
    cards = [Card(asked, *kept_views(demo.checkpoint, [asked.picture], asked.comparison.trace)) for asked in demo.asked]
    page = folder / "index.html"
    page.write_text(render_page(demo, cards), encoding="utf-8")
    return Written(page, overlays)


def _write_overlay(demo: Demo, asked: Asked, folder: Path, number: int) -> Path:
    path = folder / f"overlay-{number}-{asked.question.kind}.png"
    pruned, vanilla = asked.comparison.pruned.answer, asked.comparison.vanilla.answer
    subtitle = f"PyramidDrop: {pruned} · vanilla: {vanilla} · true: {asked.question.answer}"
    write_overlay(path, demo.checkpoint, [asked.picture], asked.comparison.trace, asked.question.question, subtitle)
    return path
