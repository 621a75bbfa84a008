"""Tables for the terminal and for documents, and their common style."""

from rich.table import Table


def new_table(*columns: str) -> Table:
    """An empty table in the common style."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
