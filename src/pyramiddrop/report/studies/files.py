"""Write a study's files: numbers as JSON and CSV, figures as PNG and SVG, and a self-contained HTML page."""

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
    """Write all files into the existing `folder`; returns the path of the page."""
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


#: Pixels on the page for an inch of a figure.
PIXELS = 150


def render_study(name: str, shown: Shown, record: Record, svgs: Mapping[str, str]) -> str:
    """The page as HTML text.

    Args:
        name: the name of the study.
        record: its record, with `command` and `setting`.
        svgs: the text of each plot's SVG file, by the plot's name.
    """
    return template("study").render(
        name=name,
        shown=shown,
        plots=[_figure(plot, svgs[plot.name]) for plot in shown.plots],
        command=record["command"],
        settings={setting.replace("_", " "): _written(value) for setting, value in _settings(record).items()},
    )


def _figure(plot: Plot, svg: str) -> dict[str, Any]:
    """The SVG element without the header of its file, which contains web addresses."""
    width = round(PIXELS * plot.figure.get_figwidth())
    return {"caption": plot.caption, "svg": svg[svg.index("<svg") :], "width": width}


def _settings(record: Record) -> dict[str, Any]:
    """The settings that were given, and the machine."""
    asked = {name: value for name, value in record["setting"].items() if value not in (None, (), [])}
    return {**asked, **{f"machine: {name}": value for name, value in record["machine"].items()}}


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_written(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
