"""Show an evaluation's record: its heading, and its tables on the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from pyramiddrop.report import units
from pyramiddrop.report.tables import markdown_table, new_table

Record = Mapping[str, Any]

#: Names of the clocks of a prefill.
CLOCKS = {"cpu": "CPU time", "wall": "time"}
#: Columns of a table on a terminal, beside the row headings.
WIDE = 4
#: Scores to compare with, and kinds of questions about text in pictures, with the headings of their rows.
BASES = {"to_vanilla": "minus vanilla", "to_first": "minus the first method"}
READING = {"text": "read in the picture", "other": "not read in it"}


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
    clock, timed = _clock(record), record["methods"][0]["prefill"] is not None
    return [
        *map(_draws_line, record.get("draws", ())),
        *(f"{name} is left out: {why}" for name, why in record.get("left_out", {}).items()),
        *_missing_controls(record),
        "Scores in percent ± standard error, clustered by picture. Differences are paired, question by question, with "
        "the 95 % interval of a bootstrap over pictures; the first method is that of the same budget. FLOPs: decoder "
        "layers and ranking, predicted, of vanilla's (convention: full). "
        + "Group A: the questions, so many, that downsampling at the same budget gets wrong (VTC-Bench). "
        * any(one.get("group_a") for one in record["methods"])
        + f"Prefill: {CLOCKS[clock]} of one batch, vision tower included, methods in turn." * timed,
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
    missing = [name for name, fits in CONTROLS.items() if not any(map(fits, asked))]
    if any(name.startswith("Downsample") for name in record.get("left_out", {})):
        missing = [name for name in missing if name != "a smaller picture"]
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
    columns = [(folded(variant["name"]), _column(record, variant)) for variant in record["methods"]]
    tables = []
    for start in range(0, len(columns), WIDE):
        names, cells = zip(*columns[start : start + WIDE], strict=True)
        tables.append(new_table("", *names, rows=[(head, *(one[head] for one in cells)) for head in cells[0]]))
    return tables


def eval_markdown(record: Record) -> str:
    """The heading, scores, scores of finer kinds, and costs in Markdown, with a row for each method."""
    variants = record["methods"]
    columns = [_column(record, variant) for variant in variants]
    finer = [_finer(record, variant) for variant in variants]
    costs = list(_costs(record, variants[0]))
    scores = [head for head in columns[0] if head not in costs]
    parts = ["  \n".join(eval_heading(record))]
    for heads, cells in [(scores, columns), (list(finer[0]), finer), (costs, columns)]:
        if heads:
            rows = [[one["name"], *(own[head] for head in heads)] for one, own in zip(variants, cells, strict=True)]
            parts.append("\n".join(markdown_table(["method", *heads], rows)))
    return "\n\n".join(parts)


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
    """The cells of one method, by row heading; old records lack some."""
    scores, methods = variant["scores"], record["methods"]
    cells = _costs(record, variant)
    if len(set(map(budget_cell, methods))) > 2:
        cells["budget"] = budget_cell(variant)
    cells[f"all ({scores['all']['count']})"] = score_cell(scores["all"])
    for name, head in BASES.items():
        if any(name in one["differences"] for one in methods):
            cells[head] = difference_cell(variant["differences"].get(name))
    if "agreement" in variant:
        cells["the same answer as vanilla"] = score_cell(variant["agreement"])
    if any(one.get("group_a") for one in methods):
        group = variant["group_a"]
        cells["group A"] = f"{score_cell(group)} ({group['count']})" if group else ""
    if any(one.get("kept_place") for one in methods):
        place = variant["kept_place"]
        cells["kept tokens, down, across"] = (
            f"{100 * place['row']:.0f} %, {100 * place['column']:.0f} %" if place else ""
        )
    for name, one in (variant.get("reading") or {}).items():
        cells[f"{READING[name]} ({one['count']})"] = score_cell(one)
    kinds = {kind: scores[kind] for kind in record["kinds"] if kind != "all"}
    return cells | {f"{kind} ({one['count']})": score_cell(one) for kind, one in kinds.items()}


def _costs(record: Record, variant: Record) -> dict[str, str]:
    tokens, prefill, clock = variant["visual_tokens"], variant["prefill"], _clock(record)
    cells = {
        "decoder FLOPs": share_cell(variant["flops_ratio"]),
        "KV cache": share_cell(variant["kv_ratio"]),
        "visual tokens": schedule_cell(tokens),
        "the same, a layer": f"{tokens['per_layer']:.1f}",
    }
    if record["methods"][0]["prefill"] is not None:
        timed = f"{units.seconds(prefill[clock])} ({units.share(prefill['ratio'])})" if prefill else ""
        cells[f"prefill, {CLOCKS[clock]}"] = timed
    return cells


def schedule_cell(tokens: Record) -> str:
    """`576 → 288 (3) → 144 (6)`: the numbers of visual tokens, with the layers of the drops."""
    first, *others = (f"{count:.0f}" for count in tokens["by_stage"])
    layers = tokens.get("drop_layers") or [None] * len(others)  # old records do not have them
    dropped = [count if layer is None else f"{count} ({layer})" for count, layer in zip(others, layers, strict=True)]
    return " → ".join([first, *dropped])


def folded(label: str) -> str:
    """A method's Python expression as the heading of a narrow column, with one argument a line."""
    name, _, arguments = label.removesuffix(")").partition("(")
    return "\n".join([name, *re.split(r", (?=\w+=)", arguments)]).strip()


def _clock(record: Record) -> str:
    return "cpu" if record["machine"]["device"] == "cpu" else "wall"


def share_cell(ratio: float | None) -> str:
    """`51.9 %`"""
    return units.UNKNOWN if ratio is None else f"{100 * ratio:.1f} %"


def score_cell(score: Record | None) -> str:
    """`88.0 ± 0.6`, in percent; without the error if it is unknown; empty for None."""
    if score is None:
        return ""
    error = "" if score["error"] is None else f" ± {100 * score['error']:.1f}"
    return f"{100 * score['mean']:.1f}{error}"


def difference_cell(difference: Record | None) -> str:
    """`-2.5 [-3.6, -1.4]`, in percent, with its interval; empty for None."""
    if difference is None:
        return ""
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    return f"{100 * mean:+.1f}" + ("" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]")
