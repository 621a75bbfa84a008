"""Write a study's files: numbers as JSON and CSV, figures as PNG and SVG, and one HTML page without a network."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyramiddrop.report.studies.paper_figure import save
from pyramiddrop.report.studies.study import Plot, Record, Shown
from pyramiddrop.report.units import template

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


#: Of the page, for an inch of a figure.
PIXELS = 150


def render_study(name: str, shown: Shown, record: Record, svgs: Mapping[str, str]) -> str:
    """The whole page as text.

    Args:
        name: of the study.
        record: holds its `command` and its `setting`.
        svgs: for each plot, by its name, the text of its SVG file.
    """
    return template("study").render(
        name=name,
        shown=shown,
        plots=[_figure(plot, svgs[plot.name]) for plot in shown.plots],
        command=record["command"],
        settings={setting.replace("_", " "): _written(value) for setting, value in _settings(record).items()},
    )


def _figure(plot: Plot, svg: str) -> dict[str, Any]:
    """The SVG element alone, without the head of its file, which names addresses."""
    width = round(PIXELS * plot.figure.get_figwidth())
    return {"caption": plot.caption, "svg": svg[svg.index("<svg") :], "width": width}


def _settings(record: Record) -> dict[str, Any]:
    """What was set, and the machine; without what was left open."""
    asked = {name: value for name, value in record["setting"].items() if value not in (None, (), [])}
    return {**asked, **{f"machine: {name}": value for name, value in record["machine"].items()}}


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_written(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
