"""Every member of the zoo passes every check; what the library refuses on it, it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.checks import CHECKS
from conformance.outcome import IMPOSSIBLE, expected, prove
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
