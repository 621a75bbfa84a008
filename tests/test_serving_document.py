"""The document of serving shows what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_document_shows_what_the_result_file_holds() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from serving_document import DOCUMENT, PLACE, filled

    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(PLACE.findall(text)) == text.count("<!-- begin"), "a table that is never filled"
    assert filled(text) == text, "run python benchmarks/serving_document.py"
