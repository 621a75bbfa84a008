"""Owns the files that a study leaves in its folder: numbers as JSON and CSV, figures as PNG and SVG, and the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from pyramiddrop.report.studies.page import render_study
from pyramiddrop.report.studies.paper_figure import save
from pyramiddrop.report.studies.study import Record, Shown

PAGE = "index.html"


def write_study(folder: Path, name: str, record: Record, shown: Shown) -> Path:
    """Write everything into `folder`, which is there already; returns the page."""
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _write_csv(folder / f"{name}.csv", shown)
    svgs = {plot.name: save(plot.figure, folder, plot.name).read_text("utf-8") for plot in shown.plots}
    page = folder / PAGE
    page.write_text(render_study(name, shown, record, svgs), encoding="utf-8")
    return page


def _write_csv(path: Path, shown: Shown) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(shown.numbers[0]))
        writer.writeheader()
        writer.writerows(shown.numbers)
