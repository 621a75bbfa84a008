"""Show an evaluation's record: its heading, and its tables on the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from pyramiddrop.report import units
from pyramiddrop.report.tables import new_table

Record = Mapping[str, Any]

#: Names of the clocks of a prefill.
CLOCKS = {"cpu": "CPU time", "wall": "time"}
#: Columns of a table on a terminal, beside the row headings.
WIDE = 4


def eval_heading(record: Record) -> list[str]:
    """The questions and the machine, a line each."""
    task, machine = record["task"], record["machine"]
    origin = ", ".join(f"{name} {task[name]}" for name in ("split", "seed") if name in task)
    where = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return [
        f"{task['name']}{f' ({origin})' if origin else ''}: {task['questions']} questions about {record['pictures']} "
        f"pictures, match: {task['match']}; model {record['model']}, {record['dtype']}, batches of {record['batch']}",
        f"{machine['architecture']}, {machine['cpu_cores']} cores, {machine['threads']} thread(s){where}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}",
    ]


def eval_notes(record: Record) -> list[str]:
    """Notes on how to read the numbers."""
    return [
        *(_draws_line(one) for one in record.get("draws", ())),
        *(f"{name} is left out: {why}" for name, why in record.get("left_out", {}).items()),
        *_missing_controls(record),
        "Scores in percent ± standard error, clustered by picture. Differences are paired, question by question, with "
        "the 95 % interval of a bootstrap over pictures; the first method is that of the same budget. FLOPs: decoder "
        "layers and ranking, predicted, of vanilla's (convention: full). "
        + "Group A: the questions, so many, that downsampling at the same budget gets wrong (VTC-Bench). "
        * any(one.get("group_a") for one in record["methods"])
        + f"Prefill: {CLOCKS[_clock(record)]} of one batch, vision tower included, methods in turn." * _timed(record),
    ]


#: What a report has to have beside its methods, by how it is recognised in a record: settings of a method.
CONTROLS: dict[str, Callable[[Record], bool]] = {
    "random inside the decoder": lambda method: method["method"] == "RandomDrop",
    "random before it": lambda method: method["method"] == "VisionDrop" and "random" in str(method["score"]),
    "uniform": lambda method: method["method"] == "UniformDrop",
    "a smaller picture": lambda method: method["method"] == "Downsample",
}


def _missing_controls(record: Record) -> list[str]:
    """One line that names the controls that were not asked, if any; those left out have lines of their own."""
    asked = [variant["method"] for variant in record["methods"] if variant["method"]]
    left_out = any(name.startswith("Downsample") for name in record.get("left_out", {}))
    missing = [
        name
        for name, fits in CONTROLS.items()
        if not any(map(fits, asked)) and not (left_out and name == "a smaller picture")
    ]
    if not missing:
        return []
    return [
        f"Not compared with {', '.join(missing)}: what a ranking does not win against them it does not win. Ask them "
        "too, at equal cost: --controls with --percent or --average-tokens."
    ]


def _draws_line(draws: Record) -> str:
    """`RandomDrop at 60 %: 70.3 over 3 draws (69.1 to 71.2)`"""
    mean, low, high = (f"{100 * draws[name]:.1f}" for name in ("mean", "low", "high"))
    at = f" at {budget_cell(draws)}" if budget_cell(draws) else ""
    return f"{draws['name']}{at}: {mean} over {draws['count']} draws ({low} to {high})"


def eval_tables(record: Record) -> list[Table]:
    """The methods side by side, a few in each table."""
    variants = record["methods"]
    columns = [_column(record, variant) for variant in variants]
    tables = []
    for start in range(0, len(variants), WIDE):
        part = slice(start, start + WIDE)
        table = new_table("", *(folded(variant["name"]) for variant in variants[part]))
        for head in columns[0]:
            table.add_row(head, *(column[head] for column in columns[part]))
        tables.append(table)
    return tables


def eval_markdown(record: Record) -> str:
    """The heading, scores, scores of finer kinds, and costs in Markdown, with a row for each method."""
    variants = record["methods"]
    columns = [_column(record, variant) for variant in variants]
    costs = list(_costs(record, variants[0]))
    scores = [head for head in columns[0] if head not in costs]
    finer = [_finer(record, variant) for variant in variants]
    tables = [(scores, columns), (list(finer[0]), finer), (costs, columns)]
    return "\n\n".join(["  \n".join(eval_heading(record)), *(_table(variants, *table) for table in tables if table[0])])


def _table(variants: Sequence[Record], heads: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
    rows = [
        [variant["name"], *(column[head] for head in heads)] for variant, column in zip(variants, columns, strict=True)
    ]
    return "\n".join(map(_line, [["method", *heads], ["---"] * (1 + len(heads)), *rows]))


def budget_cell(variant: Record) -> str:
    """`60 %` or `192 tokens`: the budget of the method; empty for vanilla."""
    if variant.get("average_tokens") is not None:
        return f"{variant['average_tokens']:g} tokens"
    return "" if variant["percent"] is None else f"{variant['percent']:g} %"


def _finer(record: Record, variant: Record) -> dict[str, str]:
    """Mean scores in percent of the finer kinds of question, by column heading."""
    scores = {kind: variant["subscores"][kind] for kind in record.get("subkinds", ())}
    return {f"{kind} ({one['count']})": f"{100 * one['mean']:.0f}" for kind, one in scores.items()}


def _column(record: Record, variant: Record) -> dict[str, str]:
    """The cells of one method, by row heading."""
    scores = variant["scores"]
    return {
        **_costs(record, variant),
        **({"budget": budget_cell(variant)} if len({budget_cell(one) for one in record["methods"]}) > 2 else {}),
        f"all ({scores['all']['count']})": score_cell(scores["all"]),
        **{head: difference_cell(variant["differences"].get(name)) for name, head in _bases(record).items()},
        **_agreement(record, variant),
        **_kept_place(record, variant),
        **_reading(variant),
        **{f"{kind} ({scores[kind]['count']})": score_cell(scores[kind]) for kind in record["kinds"] if kind != "all"},
    }


def _agreement(record: Record, variant: Record) -> dict[str, str]:
    """Agreement with vanilla, and scores on the questions that downsampling gets wrong (not in old records)."""
    rows = {}
    if "agreement" in variant:
        rows["the same answer as vanilla"] = score_cell(variant["agreement"])
    if any(one.get("group_a") for one in record["methods"]):
        group = variant["group_a"]
        rows["group A"] = f"{score_cell(group)} ({group['count']})" if group else ""
    return rows


def _reading(variant: Record) -> dict[str, str]:
    """Questions about text in pictures apart; earlier versions did not tell them."""
    heads = {"text": "read in the picture", "other": "not read in it"}
    found = variant.get("reading") or {}
    return {f"{heads[name]} ({one['count']})": score_cell(one) for name, one in found.items()}


def _kept_place(record: Record, variant: Record) -> dict[str, str]:
    """The mean place of the kept tokens (not in old records)."""
    if not any(one.get("kept_place") for one in record["methods"]):
        return {}
    place = variant["kept_place"]
    return {"kept tokens, down, across": f"{100 * place['row']:.0f} %, {100 * place['column']:.0f} %" if place else ""}


def _costs(record: Record, variant: Record) -> dict[str, str]:
    tokens, prefill, clock = variant["visual_tokens"], variant["prefill"], _clock(record)
    timed = f"{units.seconds(prefill[clock])} ({units.share(prefill['ratio'])})" if prefill else ""
    return {
        "decoder FLOPs": share_cell(variant["flops_ratio"]),
        "KV cache": share_cell(variant["kv_ratio"]),
        "visual tokens": schedule_cell(tokens),
        "the same, a layer": f"{tokens['per_layer']:.1f}",
        **({f"prefill, {CLOCKS[clock]}": timed} if _timed(record) else {}),
    }


def schedule_cell(tokens: Record) -> str:
    """`576 → 288 (3) → 144 (6)`: the numbers of visual tokens, with the layers of the drops."""
    first, *others = (f"{count:.0f}" for count in tokens["by_stage"])
    layers = tokens.get("drop_layers") or [None] * len(others)  # old records do not have them
    dropped = [count if layer is None else f"{count} ({layer})" for count, layer in zip(others, layers, strict=True)]
    return " → ".join([first, *dropped])


def _timed(record: Record) -> bool:
    return record["methods"][0]["prefill"] is not None


def folded(label: str) -> str:
    """A method's Python expression as the heading of a narrow column, with one argument a line."""
    name, _, arguments = label.removesuffix(")").partition("(")
    return "\n".join([name, *re.split(r", (?=\w+=)", arguments)]).strip()


def _bases(record: Record) -> dict[str, str]:
    """The scores to compare with, and the headings of their rows."""
    compared = {name for variant in record["methods"] for name in variant["differences"]}
    heads = {"to_vanilla": "minus vanilla", "to_first": "minus the first method"}
    return {name: head for name, head in heads.items() if name in compared}


def _clock(record: Record) -> str:
    return "cpu" if record["machine"]["device"] == "cpu" else "wall"


def share_cell(ratio: float | None) -> str:
    """`51.9 %`"""
    return units.UNKNOWN if ratio is None else f"{100 * ratio:.1f} %"


def score_cell(score: Record) -> str:
    """`88.0 ± 0.6`, in percent; without the error if it is unknown."""
    error = score["error"]
    return f"{100 * score['mean']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def difference_cell(difference: Record | None) -> str:
    """`-2.5 [-3.6, -1.4]`, in percent, with its interval; empty for None."""
    if difference is None:
        return ""
    interval = (
        "" if difference["low"] is None else f" [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
    )
    return f"{100 * difference['mean']:+.1f}{interval}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
