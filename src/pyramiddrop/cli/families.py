"""The verb `families`: which model families work, which are refused and why, and how that is known."""

from __future__ import annotations

from typing import Annotated

import typer

from pyramiddrop.cli.options import AsJson
from pyramiddrop.cli.terminal import print_json, stdout


def families(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model type, or the folder of a checkpoint: all about it.")
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/families.md.")] = False,
) -> None:
    """List the model families: text model, modalities, status, limits, and how each was tested."""
    from pyramiddrop.inference.catalog import all_families, find_family
    from pyramiddrop.report.tables.catalog import families_list, families_page, family_in_full

    entries = all_families() if model is None else [find_family(model)]
    if as_json:
        found = [entry.as_dict() for entry in entries]
        print_json({"families": found} if model is None else found[0])
    elif markdown:
        print(families_page(entries), end="")
    elif model is not None:
        stdout().print(family_in_full(entries[0]))
    else:
        for part in families_list(entries):
            stdout().print(part)
