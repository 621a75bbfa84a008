"""The document of evaluations shows what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

from pyramiddrop.report.tables.evaluation import eval_markdown

ROOT = Path(__file__).parents[1]


def test_the_document_shows_what_the_result_file_holds() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from evaluation_document import DOCUMENT
    from speed_document import filled

    text = DOCUMENT.read_text(encoding="utf-8")
    assert "| vanilla | 98.0 ± 0.5 |" in text
    assert filled(text, eval_markdown) == text, "run python benchmarks/evaluation_document.py"
