"""The page docs/conformance.md: a table of family and check, and why where the answer is not a plain yes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from conformance.checks import CHECKS
from conformance.outcome import FAILED, IMPOSSIBLE, PASSED, REFUSED, Outcome
from zoo import MEMBERS

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
MARKS = {PASSED: "✓", REFUSED: "R", IMPOSSIBLE: "·", FAILED: "✗"}
VERSIONS = "Proven with "  # the page's only line that may differ from machine to machine

Outcomes = Mapping[tuple[str, str], Outcome]  # (member, check) -> outcome

INTRODUCTION = """# Conformance

Every family that is supported runs every check below, on a tiny random model (float32, CPU). The measure is a slow
oracle that shares no code with the library: the untouched model under eager attention at full length, in which the
dropped tokens are only masked. `make conformance` runs all of it and writes this page; `make test-all` runs the same
checks as tests.
"""


def render(outcomes: Outcomes, versions: str) -> str:
    """The whole page."""
    notes = numbered_notes(outcomes)
    parts = [
        INTRODUCTION,
        f"{VERSIONS}{versions}.\n",
        "## What is checked\n",
        "".join(f"- **{check.name}**: {check.says}.\n" for check in CHECKS.values()),
        "## Family by family\n",
        "✓ holds; R refused by name, with the error quoted; · the untouched model cannot do it; ✗ fails.\n",
        table(outcomes, notes),
        "".join(f"{number}. {note}\n" for note, number in notes.items()),
    ]
    return "\n".join(part for part in parts if part)


def read_page() -> tuple[dict[tuple[str, str], Outcome], str]:
    """The outcomes that the page has, and what its rows were proven with."""
    text = PAGE.read_text()
    versions = next(line for line in text.splitlines() if line.startswith(VERSIONS))
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    outcomes = {}
    for member, *cells in re.findall(r"^\| `(.*?)` " + r"\| (.*?) " * len(CHECKS) + r"\|$", text, re.MULTILINE):
        for check, cell in zip(CHECKS, cells, strict=True):
            mark, _, number = cell.partition(" ")
            status = next(status for status, sign in MARKS.items() if sign == mark)
            why = notes[number].removeprefix(f"{status}: ") if number else ""
            outcomes[member, check] = Outcome(status, why)
    return outcomes, versions.removeprefix(VERSIONS).removesuffix(".")


def numbered_notes(outcomes: Outcomes) -> dict[str, int]:
    """Reason -> its number, in the order of the table."""
    reasons = (f"{outcome.status}: {outcome.why}" for outcome in in_order(outcomes) if outcome.why)
    return {reason: number for number, reason in enumerate(dict.fromkeys(reasons), start=1)}


def in_order(outcomes: Outcomes) -> list[Outcome]:
    """Row by row, as they stand in the table."""
    return [outcomes[member, check] for member in MEMBERS for check in CHECKS]


def table(outcomes: Outcomes, notes: Mapping[str, int]) -> str:
    """A row for each member, a column for each check."""
    rows = [["family", *CHECKS], ["---", *[":-:"] * len(CHECKS)]]
    for member in MEMBERS:
        rows.append([f"`{member}`", *(cell(outcomes[member, check], notes) for check in CHECKS)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(outcome: Outcome, notes: Mapping[str, int]) -> str:
    """A mark, and the number of its note."""
    number = notes.get(f"{outcome.status}: {outcome.why}")
    return MARKS[outcome.status] if number is None else f"{MARKS[outcome.status]} {number}"
