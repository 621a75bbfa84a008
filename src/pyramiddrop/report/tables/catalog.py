"""Tables of model families, methods and scorers, and the page docs/families.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pyramiddrop.inference.catalog import (
    BY_STRUCTURE,
    METHOD,
    OPTION,
    PROVEN,
    REFUSED,
    SAYS,
    SCORER,
    TESTED,
    FamilyEntry,
    MethodEntry,
)
from pyramiddrop.report.tables import markdown_table, new_table

HEAD = ("family", "text model", "modalities", "status", "limits", "tested")
#: The heading of each kind of entry in `methods_list`, and the width of its names.
KINDS = {
    METHOD: "--method NAME, or NAME:argument=value,...",
    SCORER: "which tokens are kept; any of them goes with any method that ranks",
    OPTION: "around any scorer",
}
NAME_WIDTH = 17
COLORS = {PROVEN: "green", REFUSED: "red", BY_STRUCTURE: "yellow"}

INTRODUCTION = """# Model families

What is known of each family of vision-language models in Transformers, by its `model_type`. `pyramiddrop families`
prints this table, with `--json` for programs, and `pyramiddrop families MODEL_TYPE_OR_FOLDER` says all about one. This
page is written by `make docs`.

A decoder-only family needs no entry: its text model, its visual tokens, its queries and keys are found in the model
itself. An entry says what was proven and what does not go. Text models and modalities are those of the tiny checkpoints
on which the suite runs ([conformance.md](conformance.md)); larger checkpoints of a family, and other text models in it,
follow the same code.
"""


def families_list(entries: Sequence[FamilyEntry]) -> list[RenderableType]:
    """The families of each status, within 80 columns; `family_in_full` shows more of each."""
    of = {status: [entry for entry in entries if entry.status == status] for status in COLORS}
    proven = _names_first("family", "modalities", "limits")
    for family, _, modalities, _, limits, _ in map(_cells, of[PROVEN]):
        proven.add_row(family, modalities, limits)
    refused = _names_first("family", "why")
    for entry in of[REFUSED]:
        refused.add_row(entry.model_type, entry.family.refused)
    lists: list[RenderableType] = [proven, refused, ", ".join(entry.model_type for entry in of[BY_STRUCTURE])]
    parts: list[RenderableType] = []
    for status, listed in zip(COLORS, lists, strict=True):
        parts += [_heading(f"{status} ({len(of[status])})", SAYS[status], COLORS[status]), listed, ""]
    return [*parts, "`pyramiddrop families NAME_OR_FOLDER` says all about one."]


def _names_first(*columns: str) -> Table:
    """A table in which only the last column is wrapped."""
    table = new_table(*columns)
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table


def _heading(title: str, says: str, color: str = "") -> Text:
    return Text.assemble((title, f"bold {color}"), f": {says}")


def family_in_full(entry: FamilyEntry) -> Table:
    """All facts about one family, a line each."""
    _, text, modalities, status, _, tested = _cells(entry)
    table = new_table("", entry.model_type, rows=[("text model", text), ("modalities", modalities)])
    table.add_row("status", Text(status, style=COLORS[status]))
    table.add_row("", SAYS[status])
    for number, limit in enumerate(entry.limits):
        table.add_row("" if number else "why" if entry.family.refused else "limits", limit)
    table.add_row("tested", tested)
    return table


def families_page(entries: Sequence[FamilyEntry]) -> str:
    """The page docs/families.md."""
    lines = [INTRODUCTION]
    for status in COLORS:
        chosen = [_cells(entry) for entry in entries if entry.status == status]
        lines += [f"## {status.capitalize()} ({len(chosen)})", "", f"{SAYS[status][0].upper()}{SAYS[status][1:]}.", ""]
        if status == BY_STRUCTURE:
            lines += [", ".join(f"`{family}`" for family, *_ in chosen) + "."]
        else:  # families are code, because some have underscores
            rows = [(f"`{family}`", f"`{text}`".replace(", ", "`, `"), *others) for family, text, *others in chosen]
            lines += markdown_table(HEAD, rows)
        lines += [""]
    return "\n".join([*lines, *_legend(entries)])


def _legend(entries: Sequence[FamilyEntry]) -> list[str]:
    """The meaning of the short names of limits; a name may have several meanings, one for each family."""
    meanings: dict[str, dict[str, None]] = {}
    for limit in (limit for entry in entries for limit in entry.family.limits):
        meanings.setdefault(limit.name, {})[limit.description] = None
    lines = [f"- **{name}**: {'; or: '.join(says)}." for name, says in sorted(meanings.items())]
    return [
        "## Limits",
        "",
        "`pyramiddrop families MODEL_TYPE` says which sentence holds for a family.",
        "",
        *lines,
        "",
    ]


def _cells(entry: FamilyEntry) -> tuple[str, ...]:
    """The cells of an entry under `HEAD`."""
    family = entry.family
    limits = family.refused or ", ".join(dict.fromkeys(limit.name for limit in family.limits))
    modalities = ", ".join(family.modalities) if entry.known else ""
    return entry.model_type, ", ".join(family.text), modalities, entry.status, limits, TESTED[entry.status]


def methods_list(entries: Sequence[MethodEntry]) -> list[RenderableType]:
    """Methods, scorers and options, each with its rule, arguments and source, within 80 columns."""
    parts: list[RenderableType] = []
    for kind, says in KINDS.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True, min_width=NAME_WIDTH)
        table.add_column()
        for entry in entries:
            if entry.kind == kind:
                arguments = f"arguments: {', '.join(entry.arguments)}" if entry.arguments else ""
                told = "; ".join(filter(None, (arguments, entry.source)))
                table.add_row(entry.name, Text.assemble(entry.rule, (f" ({told})" if told else "", "dim")))
        parts += [_heading(f"{kind}s", says), table, ""]
    return parts[:-1]
