"""Write the demo's files: a self-contained HTML page, and an overlay picture for each question."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramiddrop.inference.demo import Asked, Demo
from pyramiddrop.report.pictures.overlay import overlay_grey, picture_data
from pyramiddrop.report.pictures.visual import Visual, token_status, visualize
from pyramiddrop.report.tables import runs
from pyramiddrop.report.units import template

README_ONLINE = "https://github.com/pyramiddrop/pyramiddrop#readme"


def write_demo(demo: Demo, folder: Path) -> tuple[Path, list[Path]]:
    """Write `index.html` and `overlay-N-KIND.png` for each question into the existing `folder`; returns their paths."""
    visuals = [_visual(demo, asked) for asked in demo.asked]
    kinds = [asked.question.kind for asked in demo.asked]
    overlays = [folder / f"overlay-{number}-{kind}.png" for number, kind in enumerate(kinds, start=1)]
    for visual, path in zip(visuals, overlays, strict=True):
        visual.save(path)
    page = folder / "index.html"
    page.write_text(_render_page(demo, visuals, readme_link(folder)), encoding="utf-8")
    return page, overlays


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


def readme_link(folder: Path, source: Path = Path(__file__).parents[3]) -> str:
    """The link from a page in `folder` to the README in the source tree, or else to the project's page."""
    readme = source / "README.md"
    return os.path.relpath(readme, folder) if readme.is_file() else README_ONLINE


def _render_page(demo: Demo, visuals: Sequence[Visual], readme: str) -> str:
    """The page as HTML text; `readme` is the target of its link to the README."""
    medians = {
        "flops": demo.medians(lambda one: one.usage.flops),
        "kv": demo.medians(lambda one: one.usage.kv_bytes),
        "wall": demo.medians(lambda one: one.prefill.wall),
        "cpu": demo.medians(lambda one: one.prefill.cpu),
    }
    cards = [_card(asked, visual) for asked, visual in zip(demo.asked, visuals, strict=True)]
    return template("demo").render(
        demo=demo,
        cards=cards,
        pictures={card["picture"]: picture_data(visual.pixels[0]) for card, visual in zip(cards, visuals, strict=True)},
        dark_pictures={card["picture"]: overlay_grey(card["asked"].picture) > 128 for card in cards},
        ratios={name: after / before if before else 1.0 for name, (before, after) in medians.items()},
        medians=medians,
        pyramid=visuals[0].stages,
        right=[sum(right) for right in zip(*demo.right, strict=True)],
        remarks=runs.summary(demo),
        own_model=runs.OWN_MODEL,
        readme=readme,
    )


def _card(asked: Asked, visual: Visual) -> dict[str, Any]:
    """One question on the page: `picture`, an id, the first view, and for each stage the patches that are dropped."""
    view, panels = visual.seen[0].view, []
    for stage in visual.stages:
        squares = [f"M{column} {row}h1v1h-1z" for row, column in view.grid if (row, column) not in stage.cells[0]]
        panels.append({"layers": stage.layers, "tokens": stage.tokens, "dropped": "".join(squares)})  # an SVG path
    picture, status = asked.question.image.stem, token_status(visual.stages, 0, view)
    return {"asked": asked, "picture": picture, "view": view, "panels": panels, "token_status": status}
