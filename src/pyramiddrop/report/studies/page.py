"""Owns a study's page: one HTML file that holds its figures, its tables and how it was made, and needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyramiddrop.report.studies.study import Plot, Record, Shown
from pyramiddrop.report.template import template

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
