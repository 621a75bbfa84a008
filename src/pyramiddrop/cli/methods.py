"""The verb `methods`: the methods and scorers, and where each was published."""

from __future__ import annotations

from dataclasses import asdict

from pyramiddrop.cli.options import AsJson
from pyramiddrop.cli.terminal import print_json, stdout


def methods(as_json: AsJson = False) -> None:
    """List the methods, the scorers that they can rank by (score=NAME), and the options that go with any scorer.

    Every argument is also an option of --method, as in pyramiddrop:score=diversity.
    """
    from pyramiddrop.inference.catalog import all_entries
    from pyramiddrop.report.tables.catalog import methods_list

    entries = all_entries()
    if as_json:
        print_json({"methods": list(map(asdict, entries))})
    else:
        for part in methods_list(entries):
            stdout().print(part)
