"""Makes the tables of docs/evaluation.md from benchmarks/results; see there which command made each file.

python benchmarks/evaluation_document.py
"""

from __future__ import annotations

from speed_document import ROOT, filled

from pyramiddrop.report.tables.evaluation import eval_markdown

DOCUMENT = ROOT / "docs" / "evaluation.md"

if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), eval_markdown), encoding="utf-8")
