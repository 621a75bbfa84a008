"""`make conformance`: run every check on every member, or on those that are named, and write their rows of the page."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from importlib.metadata import version

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conformance.checks import CHECKS
from conformance.outcome import FAILED, Outcome, outcome
from conformance.page import PAGE, read_page, render
from zoo import MEMBERS


def prove_all(members: list[str], console: Console) -> dict[tuple[str, str], Outcome]:
    """All checks on these members; what fails is told at once."""
    outcomes = {}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(members) * len(CHECKS))
        for member in members:
            progress.update(task, description=member)
            for check in CHECKS:
                found = outcomes[member, check] = outcome(MEMBERS[member], CHECKS[check])
                if found.status == FAILED:
                    console.print(f"[red]{member}: {check}: {found.why}", highlight=False)
                progress.advance(task)
    return outcomes


def main(names: list[str]) -> int:
    """The exit status: 1 where a check fails."""
    warnings.simplefilter("ignore")
    console = Console()
    outcomes = prove_all(names or list(MEMBERS), console)
    counts = Counter(found.status for found in outcomes.values())
    console.print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    versions = " and ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    if names:  # the other rows stay as the page has them
        others, proven = read_page()
        outcomes = {**others, **outcomes}
        own = f"{', '.join(names)} with {versions}"
        versions = proven if versions == proven or own in proven else f"{proven}; {own}"
    PAGE.write_text(render(outcomes, versions))
    console.print(f"written: {PAGE.relative_to(PAGE.parents[1])}")
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
