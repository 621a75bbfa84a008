"""Makes the tables and the picture of docs/speed.md from benchmarks/results; see there which command made each file.

python benchmarks/speed_document.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyramiddrop.report.speed_plot import draw_speed
from pyramiddrop.report.tables.speed import speed_markdown

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- begin (\S+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def filled(text: str, written: Callable[[dict[str, Any]], str] = speed_markdown) -> str:
    """`text` with what each named file holds between its `begin` and `end`."""
    return PLACE.sub(lambda place: place[1] + written(_record(place[2])) + place[3], text)


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    draw_speed(_record("prefill-cpu.json")).savefig(ROOT / "docs" / "images" / "speed.png", facecolor="white")
