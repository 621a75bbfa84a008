"""The figures and tables of a study, shared by the terminal, the page and the documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from pyramiddrop.report.tables.evaluation import score_cell
from pyramiddrop.report.tables.style import new_table

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
        table = new_table(*self.head)
        table.title, table.title_justify, table.title_style = self.title, "left", "bold"
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
    numbers: Sequence[Record] = field(default_factory=list)


def percent(score: Record | None) -> str:
    """`88.3 ± 1.0`, for a score in 0..1; empty for None."""
    return "" if score is None else score_cell(score)


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
