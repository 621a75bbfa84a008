"""The document of the studies shows what was measured."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_document_shows_what_the_result_files_hold() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from speed_document import filled
    from studies_document import DOCUMENT, written

    text = DOCUMENT.read_text(encoding="utf-8")
    assert "| 7 | 98.3 ± 0.6 | 98.3 ± 0.6 | 98.1 ± 0.6 | 98.3 ± 0.6 |" in text  # as docs/digits.md has it
    assert filled(text, written) == text, "run python benchmarks/studies_document.py"
    pictures = re.findall(r"\]\((images/[\w-]+\.png)\)", text)
    assert len(pictures) == 6
    assert all((DOCUMENT.parent / name).is_file() for name in pictures)
