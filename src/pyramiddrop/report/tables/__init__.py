"""Tables for the terminal and for documents, and their common style."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def new_table(*columns: str, rows: Iterable[Sequence[str | Text]] = ()) -> Table:
    """A table in the common style."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def judged(text: str, right: bool) -> Text:
    """The text with a green tick or a red cross."""
    return Text(f"{text} {'✓' if right else '✗'}", style="green" if right else "red")
