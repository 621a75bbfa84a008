"""The paper's FLOPs figures as data, each beside the cost model's."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramiddrop.cost import PRESETS, Prompt, estimate_cost
from pyramiddrop.schedule import Schedule, Stage, powers

STAGES = 4  # of the paper's PyramidDrop, equal
_FILE = Path(__file__).parent / "flops.csv"


@dataclass(frozen=True)
class Figure:
    """A figure that the paper prints, in TFLOPs, and ours.

    Attributes:
        table: its table in the paper.
        preset: the model's name in `pyramiddrop.cost.PRESETS`.
        method: the method and its settings, as text.
        printed: the figure as the paper prints it.
        exact: ours by the `paper` convention, not rounded.
    """

    table: str
    preset: str
    visual_tokens: int
    method: str
    printed: str
    exact: float

    @property
    def ours(self) -> str:
        """Our figure, rounded to as many digits as the paper prints."""
        decimals = len(self.printed.partition(".")[2])
        return f"{self.exact:.{decimals}f}"

    @property
    def agrees(self) -> bool:
        """True if ours equals the printed figure, digit by digit."""
        return self.ours == self.printed

    def as_dict(self) -> dict[str, Any]:
        """The figure as plain text and numbers; `exact` in TFLOPs."""
        return {**vars(self), "ours": self.ours, "agrees": self.agrees}


def paper_figures() -> list[Figure]:
    """All FLOPs figures of the paper beside ours, in the paper's order."""
    with _FILE.open(encoding="utf-8", newline="") as file:
        return [_figure(row) for row in csv.DictReader(file)]


def _figure(row: dict[str, str]) -> Figure:
    shape, tokens = PRESETS[row["preset"]].shape, int(row["visual_tokens"])
    schedule, method = None, "vanilla"
    if row["method"] == "pyramiddrop":
        schedule = Schedule.equal(shape.decoder.layers, STAGES, powers(float(row["lam"]), STAGES - 1))
        method = f"PyramidDrop λ={row['lam']}"
    elif row["method"] == "fastv":
        schedule = Schedule((Stage(int(row["layer"]), float(row["keep"])),))
        method = f"FastV K={row['layer']} R={1 - float(row['keep']):.0%}"
    flops = estimate_cost(shape, Prompt(tokens), schedule).paper
    return Figure(row["table"], row["preset"], tokens, method, row["tflops"], flops / 1e12)
