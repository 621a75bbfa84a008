"""Every member of the zoo passes every check; what the library refuses on it, it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.checks import CHECKS
from conformance.outcome import FAILED, IMPOSSIBLE, expected, prove
from conformance.page import MARKS, PAGE
from conformance.setups import FAST, SETUPS
from zoo import MEMBERS

CORE = ("prefill", "generate", "training")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about its own new names


def cases() -> list[Any]:
    """Member by member, so that a member is built once; all but the core on the representatives is slow."""
    return [
        pytest.param(member, check, marks=() if member in FAST and check in CORE else pytest.mark.slow)
        for member in MEMBERS
        for check in CHECKS
    ]


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize(("member", "check"), cases())
def test_conformance(member: str, check: str) -> None:
    if expected(MEMBERS[member], CHECKS[check]).status == IMPOSSIBLE:
        pytest.skip(expected(MEMBERS[member], CHECKS[check]).why)
    prove(MEMBERS[member], CHECKS[check])


def test_the_tables_name_what_there_is() -> None:
    assert set(FAST) <= set(MEMBERS)
    assert set(SETUPS) <= set(MEMBERS)
    for setup in SETUPS.values():
        assert set(setup.refused) <= {*CHECKS, "*"}
        assert set(setup.impossible) <= set(CHECKS)


# --- The committed page ---------------------------------------------------------------------------------------------


def page_rows() -> list[list[str]]:
    """The table of the page: its cells."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_member_and_check() -> None:
    head, _, *rows = page_rows()
    assert head == ["family", *CHECKS]
    assert [row[0].strip("`") for row in rows] == list(MEMBERS)


def test_the_page_says_what_the_suite_expects() -> None:
    """A cell may tell of a failure; else it stands as the suite has it, with the reasons below the table."""
    for name, *cells in page_rows()[2:]:
        for cell, check in zip(cells, CHECKS.values(), strict=True):
            wanted = expected(MEMBERS[name.strip("`")], check)
            assert cell.split()[0] in (MARKS[wanted.status], MARKS[FAILED]), f"{name}, {check.name}"
            assert (
                cell.startswith(MARKS[FAILED]) or f"{wanted.status}: {wanted.why}" in PAGE.read_text() or not wanted.why
            )
