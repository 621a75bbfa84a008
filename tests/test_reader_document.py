"""The document of the reader benchmark shows what was measured."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from reader_document import DOCUMENT, overview, written  # noqa: E402
from speed_document import filled  # noqa: E402


def test_the_document_shows_what_the_result_files_hold() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert filled(text, written) == text, "run python benchmarks/reader_document.py"
    shown = re.findall(r"<!-- begin (\S+) -->\n\S", text)
    assert shown == [
        *(f"reader-{name}.json" for name in ("equal", "budgets", "128", "64")),
        *(f"study-reader-{name}.json" for name in ("redundancy", "ablation")),
    ]
    pictures = re.findall(r"\]\((images/[\w-]+\.png)\)", text)
    assert len(pictures) == 4
    assert all((DOCUMENT.parent / name).is_file() for name in pictures)


def variant(name: str, budget: float, mean: float, **settings: Any) -> dict[str, Any]:
    score = {"mean": mean, "error": 0.01, "count": 40}
    return {
        "method": {"method": name, **settings},
        "percent": budget,
        "visual_tokens": {"drop_layers": settings.get("layers", [3, 6, 9])},
        "scores": {"all": score},
        "differences": {"to_first": {**score, "mean": mean - 0.9, "low": -0.1, "high": 0.1}},
    }


def test_methods_stand_in_rows_and_budgets_in_columns() -> None:
    vanilla = {"scores": {"all": {"mean": 1.0, "error": 0.0, "count": 40}}}
    variants = [
        one
        for budget in (60.0, 40.0)
        for one in (
            variant("PyramidDrop", budget, 0.9),
            variant("PyramidDrop", budget, 0.8, layers=[3]),
            variant("RandomDrop", budget, 0.5, seed=0),
            variant("RandomDrop", budget, budget / 100, seed=1),
        )
    ]
    scores, differences = overview({"methods": [vanilla, *variants]})
    assert scores.head == ("method", "60 %", "40 %")
    assert list(scores.rows) == [
        ("vanilla", "100.0 ± 0.0", "100.0 ± 0.0"),
        ("PyramidDrop, 4 stages", "90.0 ± 1.0", "90.0 ± 1.0"),
        ("one drop before layer 3, ranked as PyramidDrop ranks", "80.0 ± 1.0", "80.0 ± 1.0"),
        ("random, 4 stages", "55.0 (50.0 to 60.0)", "45.0 (40.0 to 50.0)"),
    ]
    assert differences.title.startswith("minus PyramidDrop, 4 stages")
    assert list(differences.rows) == [
        ("one drop before layer 3, ranked as PyramidDrop ranks", *["-10.0 [-10.0, +10.0]"] * 2),
        ("random, 4 stages", "-35.0 (-40.0 to -30.0)", "-45.0 (-50.0 to -40.0)"),
    ]
