"""Show model families, methods and scorers: tables on the terminal, and the page docs/families.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from pyramiddrop.inference.catalog import BY_STRUCTURE, PROVEN, REFUSED, SAYS, TESTED, FamilyEntry, MethodEntry
from pyramiddrop.report.tables.style import new_table

HEAD = ("family", "text model", "modalities", "status", "limits", "tested")
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


def families_table(entries: Sequence[FamilyEntry]) -> Table:
    """One row a family. How it was tested goes with its status, and is left out: terminals are narrow."""
    table = new_table(*HEAD[:-1])
    for column in (0, 2):
        table.columns[column].no_wrap = True
    for entry in entries:
        family, text, modalities, status, limits, _ = _cells(entry)
        table.add_row(family, text, modalities, Text(status, style=COLORS[status]), limits)
    return table


def family_in_full(entry: FamilyEntry) -> Table:
    """All that is known of one family: a line for each thing."""
    table = new_table("", entry.model_type)
    table.add_row("text model", _text(entry))
    table.add_row("modalities", _modalities(entry))
    table.add_row("status", Text(entry.status, style=COLORS[entry.status]))
    table.add_row("", SAYS[entry.status])
    for number, limit in enumerate(entry.limits):
        table.add_row("" if number else "why" if entry.family.refused else "limits", limit)
    table.add_row("tested", TESTED[entry.status])
    return table


def families_summary(entries: Sequence[FamilyEntry]) -> str:
    """How many there are of each status."""
    counts = [(status, sum(entry.status == status for entry in entries)) for status in (PROVEN, REFUSED, BY_STRUCTURE)]
    return ", ".join(f"{count} {status}" for status, count in counts)


def families_page(entries: Sequence[FamilyEntry]) -> str:
    """The page docs/families.md."""
    parts = [INTRODUCTION]
    for status in (PROVEN, REFUSED, BY_STRUCTURE):
        chosen = [entry for entry in entries if entry.status == status]
        head = [f"## {status.capitalize()} ({len(chosen)})", "", _sentence(SAYS[status]), ""]
        parts.append("\n".join([*head, *(_names(chosen) if status == BY_STRUCTURE else _rows(chosen)), ""]))
    return "\n".join([*parts, "\n".join(_legend(entries))])


def _rows(entries: Sequence[FamilyEntry]) -> list[str]:
    """The lines of a Markdown table; families are code, for some have underscores."""
    cells = [_cells(entry) for entry in entries]
    rows = [(f"`{family}`", _code(text), *others) for family, text, *others in cells]
    return [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]


def _names(entries: Sequence[FamilyEntry]) -> list[str]:
    return [", ".join(f"`{entry.model_type}`" for entry in entries) + "."]


def _legend(entries: Sequence[FamilyEntry]) -> list[str]:
    """What the short names of limits mean; a name may stand for several sentences, of which one holds for a family."""
    meanings: dict[str, dict[str, None]] = {}
    for limit in (limit for entry in entries for limit in entry.family.limits):
        meanings.setdefault(limit.name, {})[limit.says] = None
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
    limits = entry.family.refused or ", ".join(dict.fromkeys(limit.name for limit in entry.family.limits))
    return entry.model_type, _text(entry), _modalities(entry), entry.status, limits, TESTED[entry.status]


def _text(entry: FamilyEntry) -> str:
    return ", ".join(entry.family.text)


def _modalities(entry: FamilyEntry) -> str:
    return ", ".join(entry.family.modalities) if entry.known else ""


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def methods_table(entries: Sequence[MethodEntry]) -> Table:
    """One row an entry, kinds apart."""
    table = new_table("", "name", "rule", "arguments", "source")
    for number, entry in enumerate(entries):
        first = number == 0 or entries[number - 1].kind != entry.kind
        if first and number:
            table.add_section()
        kind = f"{entry.kind}s" if first else ""
        table.add_row(kind, entry.name, entry.rule, ", ".join(entry.arguments), entry.source)
    return table
