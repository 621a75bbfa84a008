"""Show the methods and scorers as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pyramiddrop.inference.method_catalog import Entry
from pyramiddrop.report.tables.style import new_table


def methods_table(entries: Sequence[Entry]) -> Table:
    """One row an entry, kinds apart."""
    table = new_table("", "name", "rule", "arguments", "source")
    for number, entry in enumerate(entries):
        first = number == 0 or entries[number - 1].kind != entry.kind
        if first and number:
            table.add_section()
        kind = f"{entry.kind}s" if first else ""
        table.add_row(kind, entry.name, entry.rule, ", ".join(entry.arguments), entry.source)
    return table
