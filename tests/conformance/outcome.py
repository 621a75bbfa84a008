"""What a check on a member must come to, and what it came to."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from conformance.checks import Check
from conformance.setups import setup_of
from conformance.subject import Subject, subject_of
from pyramiddrop import PyramidDrop, apply
from zoo import Member

PASSED, REFUSED, IMPOSSIBLE, FAILED = "passed", "refused", "not possible", "failed"


@dataclass(frozen=True)
class Outcome:
    """One cell of the table; `why` is empty where it passed."""

    status: str
    why: str = ""


def expected(member: Member, check: Check) -> Outcome:
    """What must come out: the refusals and the impossible are known, all else passes."""
    impossible = check.impossible(member) or setup_of(member).impossible.get(check.name)
    if impossible is not None:
        return Outcome(IMPOSSIBLE, impossible)
    refusal = setup_of(member).refusal(check.name)
    return Outcome(PASSED) if refusal is None else Outcome(REFUSED, refusal)


def prove(member: Member, check: Check) -> Outcome:
    """Run the check; raises where it does not come to what is expected."""
    wanted = expected(member, check)
    if wanted.status == PASSED:
        check.run(subject_of(member))
    elif wanted.status == REFUSED:
        prove_refusal(member, check, wanted.why)
    return wanted


def prove_refusal(member: Member, check: Check, words: str) -> None:
    """The library must refuse by name, in these words."""
    run = attach if setup_of(member).hopeless else check.run  # what the oracle needs may be missing, too
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(words)):
        run(subject_of(member))


def attach(subject: Subject) -> None:
    """Put a method on the model."""
    apply(subject.model, PyramidDrop())


def outcome(member: Member, check: Check) -> Outcome:
    """The same for the table: a failure becomes a cell."""
    try:
        return prove(member, check)
    except Exception as error:
        return Outcome(FAILED, f"{type(error).__name__}: {error}".strip().splitlines()[0])
