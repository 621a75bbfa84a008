"""The paper's FLOPs figures as data, each beside the cost model's."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramiddrop.cost import PRESETS, Prompt, estimate_cost
from pyramiddrop.schedule import Schedule, Stage, powers

STAGES = 4  # of the paper's PyramidDrop, equal


def read_csv(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of this package, without its suffix."""
    with (Path(__file__).parent / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Figure:
    """A figure that the paper prints in a table, in TFLOPs, and ours."""

    table: str
    preset: str  # a name in `pyramiddrop.cost.PRESETS`
    visual_tokens: int
    method: str  # with its settings
    printed: str
    exact: float  # ours by the `paper` convention, not rounded

    @property
    def ours(self) -> str:
        """Our figure, rounded to as many digits as the paper prints."""
        return f"{self.exact:.{len(self.printed.partition('.')[2])}f}"

    @property
    def agrees(self) -> bool:
        """True if ours equals the printed figure, digit by digit."""
        return self.ours == self.printed

    def as_dict(self) -> dict[str, Any]:
        """The figure as plain text and numbers; `exact` in TFLOPs."""
        return {**vars(self), "ours": self.ours, "agrees": self.agrees}


def paper_figures() -> list[Figure]:
    """All FLOPs figures of the paper beside ours, in the paper's order."""
    found = []
    for row in read_csv("flops"):
        shape, tokens = PRESETS[row["preset"]].shape, int(row["visual_tokens"])
        schedule, method = None, "vanilla"
        if row["method"] == "pyramiddrop":
            schedule = Schedule.equal(shape.decoder.layers, STAGES, powers(float(row["lam"]), STAGES - 1))
            method = f"PyramidDrop λ={row['lam']}"
        elif row["method"] == "fastv":
            schedule = Schedule((Stage(int(row["layer"]), float(row["keep"])),))
            method = f"FastV K={row['layer']} R={1 - float(row['keep']):.0%}"
        flops = estimate_cost(shape, Prompt(tokens), schedule).paper
        found.append(Figure(row["table"], row["preset"], tokens, method, row["tflops"], flops / 1e12))
    return found
