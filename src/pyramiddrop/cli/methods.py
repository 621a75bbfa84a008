"""The verb `methods`: the methods and scorers, and where each was published."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pyramiddrop.cli.terminal import results


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """List the methods, the scorers that they can rank by (score=NAME), and the options that go with any scorer.

    Every argument is also an option in words, as bench, cost, eval and study read them: pyramiddrop:score=diversity.
    """
    from pyramiddrop.inference.catalog import all_entries
    from pyramiddrop.report.tables.catalog import methods_table

    entries = all_entries()
    if as_json:
        print(json.dumps({"methods": [entry.as_dict() for entry in entries]}, indent=2))
    else:
        results().print(methods_table(entries))
