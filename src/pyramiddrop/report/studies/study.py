"""The figures and tables of a study, and its files: JSON, CSV, PNG, SVG and a self-contained HTML page."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from pyramiddrop.report.studies.paper_figure import save
from pyramiddrop.report.tables import markdown_table, new_table
from pyramiddrop.report.units import template

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its files and a caption."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Sheet:
    """A table of text: title, head and rows."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def table(self) -> Table:
        """The table for a terminal."""
        table = new_table(*self.head, rows=self.rows)
        table.title, table.title_justify, table.title_style = self.title, "left", "bold"
        return table

    def markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join(markdown_table(self.head, self.rows))


@dataclass(frozen=True)
class Shown:
    """The presentation of a study.

    Attributes:
        title: the question of the study.
        conclusion: the answer, in a sentence with numbers.
        lead: how to read the figures.
        remarks: further notes.
        numbers: the rows of the CSV file, all with the same keys.
    """

    title: str
    conclusion: str
    lead: str
    plots: Sequence[Plot]
    sheets: Sequence[Sheet]
    remarks: Sequence[str] = ()
    numbers: Sequence[Record] = ()


def small(score: Record | None) -> str:
    """`0.0021 ± 0.0003`, to two digits; empty for None."""
    if score is None:
        return ""
    error = "" if score["error"] is None else f" ± {score['error']:.2g}"
    return f"{score['mean']:.2g}{error}"


def from_vanilla(vanilla: float, mean: float) -> str:
    """`4.4 points below vanilla`, for two scores in 0..1."""
    return f"{100 * abs(vanilla - mean):.1f} points {'above' if mean > vanilla else 'below'} vanilla"


def bounds(scores: Sequence[Record], part: bool = True) -> tuple[list[float], list[float], list[float]]:
    """One standard error below each mean, the means, and one above.

    Args:
        part: True for scores in 0..1, which are returned in percent, within 0..100. Others are positive, with a lower
            bound of at least a tenth of the mean, for logarithmic axes.
    """
    ends = [(one["mean"], one["error"] or 0.0) for one in scores]
    scale, most = (100, 1.0) if part else (1, math.inf)
    return (
        [scale * max(0.0 if part else mean / 10, mean - error) for mean, error in ends],
        [scale * mean for mean, _ in ends],
        [scale * min(most, mean + error) for mean, error in ends],
    )


def plot_scores(axis: Axes, places: Sequence[float], scores: Sequence[Record], part: bool = True, **style: Any) -> None:
    """Draw a line through the means of `scores`, in a band of one standard error; see :func:`bounds`."""
    low, middle, high = bounds(scores, part)
    axis.fill_between(places, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.plot(places, middle, **style)


def write_study(folder: Path, name: str, record: Record, shown: Shown) -> Path:
    """Write all files into the existing `folder`; returns the path of the page."""
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(shown.numbers[0]))
        writer.writeheader()
        writer.writerows(shown.numbers)
    plots = []
    for plot in shown.plots:
        svg = save(plot.figure, folder, plot.name).read_text("utf-8")
        svg = svg[svg.index("<svg") :]  # without the header of its file, which contains web addresses
        width = round(150 * plot.figure.get_figwidth())  # pixels on the page
        plots.append({"caption": plot.caption, "svg": svg, "width": width})
    given = {name: value for name, value in record["setting"].items() if value not in (None, (), [])}
    given |= {f"machine: {name}": value for name, value in record["machine"].items()}
    settings = {setting.replace("_", " "): _written(value) for setting, value in given.items()}
    page = folder / "index.html"
    html = template("study").render(name=name, shown=shown, plots=plots, command=record["command"], settings=settings)
    page.write_text(html, encoding="utf-8")
    return page


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_written(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
