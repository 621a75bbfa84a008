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
ON_GPU = "*-cuda.json"
NOT_RUN = "**No GPU has run it yet.**"


def filled(text: str, written: Callable[[dict[str, Any]], str] = speed_markdown, results: Path = RESULTS) -> str:
    """`text` with what each named file holds between its `begin` and `end`; `*-cuda.json` names all that there are."""

    def content(name: str) -> str:
        if name != ON_GPU:
            return written(_record(results / name))
        found = sorted(results.glob(ON_GPU))
        return "\n\n".join(f"### {path.stem}\n\n{written(_record(path))}" for path in found) or NOT_RUN

    return PLACE.sub(lambda place: place[1] + content(place[2]) + place[3], text)


def _record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    draw_speed(_record(RESULTS / "prefill-cpu.json")).savefig(ROOT / "docs" / "images" / "speed.png", facecolor="white")
