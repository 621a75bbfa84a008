"""Makes the tables and pictures of docs/reader.md from benchmarks/results; see there which command made each file.

python benchmarks/reader_document.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure
from speed_document import RESULTS, ROOT, filled
from studies_document import attention_of, read, save_pictures
from studies_document import written as study_tables

from pyramiddrop.assets import reader_checkpoint
from pyramiddrop.evaluation.tasks import reader_task
from pyramiddrop.report.studies.redundancy_plot import draw_redundancy
from pyramiddrop.report.studies.study import Sheet
from pyramiddrop.report.studies.tradeoff import draw_tradeoff, draw_tradeoff_by_kind
from pyramiddrop.report.tables.evaluation import (
    budget_cell,
    difference_cell,
    eval_markdown,
    schedule_cell,
    score_cell,
)

DOCUMENT = ROOT / "docs" / "reader.md"

Record = Mapping[str, Any]
Ways = Sequence[Record]


def written(record: Record) -> str:
    """The tables of a study, or of an evaluation: first methods by budgets, then everything."""
    if "study" in record:
        return study_tables(dict(record))
    if len({variant["average_tokens"] for variant in record["methods"]} - {None}) > 1 and record.get("draws"):
        return schedules(record).markdown()
    return "\n\n".join(
        [*(f"*{sheet.title}*\n\n{sheet.markdown()}" for sheet in overview(record)), eval_markdown(record)]
    )


def overview(record: Record) -> list[Sheet]:
    """One row a method and one column a budget: scores, and paired differences to the first method."""
    vanilla, *variants = record["methods"]
    budgets = list(dict.fromkeys(map(budget_cell, variants)))
    by_name = {name: by_budget(variants, name) for name in dict.fromkeys(map(name_of, variants))}
    first, *others = by_name
    scores = [(name, *(scored(found[budget]) for budget in budgets)) for name, found in by_name.items()]
    whole = score_cell(vanilla["scores"]["all"])
    differences = [(name, *(compared(by_name[name][budget]) for budget in budgets)) for name in others]
    return [
        Sheet("right answers (%), by budget", ("method", *budgets), [("vanilla", *[whole] * len(budgets)), *scores]),
        Sheet(f"minus {first}, paired, points [95 % interval]", ("method", *budgets), differences),
    ]


def schedules(record: Record) -> Sheet:
    """One row a method at a budget: its schedule, and its scores beside those of the controls; draws are one row."""
    vanilla, *variants = record["methods"]
    head = ("average", "method", "visual tokens (before layer)", "right answers (%)", "minus the first", "group A")
    rows = [("576", "vanilla", "576", score_cell(vanilla["scores"]["all"]), "", "")]
    for _, found in groupby(variants, key=drawn):
        draws = list(found)
        group = [{"mean": draw["group_a"]["mean"], "error": draw["group_a"]["error"]} for draw in draws]
        rows.append(
            (
                f"{draws[0]['average_tokens']:g}",
                f"`{draws[0]['name']}`" + f", {len(draws)} draws" * (len(draws) > 1),
                schedule_cell(draws[0]["visual_tokens"]),
                scored(draws),
                compared(draws) if "to_first" in draws[0]["differences"] else "",
                score_cell(group[0]) if len(group) == 1 else spread([one["mean"] for one in group]),
            )
        )
    return Sheet("by the average of visual tokens", head, rows)


def drawn(variant: Record) -> str:
    """The same for all draws of one method by chance at one budget."""
    settings = {name: value for name, value in variant["method"].items() if name != "seed"}
    score = settings.get("score")
    if score == "random" or (isinstance(score, dict) and score["name"] == "random"):
        settings["score"] = "random"
    return json.dumps([variant["average_tokens"], settings])


def name_of(variant: Record) -> str:
    """What a method is, whatever its shares are solved for; all draws of chance have one name."""
    settings, layers = variant["method"], variant["visual_tokens"]["drop_layers"]
    stages = f"{len(layers) + 1} stages"
    if settings["method"] == "FastV":
        return f"FastV, K = {settings['layer']}"
    if settings["method"] == "PyramidDrop" and len(layers) == 1:
        return f"one drop before layer {layers[0]}, ranked as PyramidDrop ranks"
    names = {"PyramidDrop": f"PyramidDrop, {stages}", "UniformDrop": f"uniform, {stages}"}
    return names.get(
        settings["method"], f"random, {stages}" if settings["method"] == "RandomDrop" else settings["method"]
    )


def by_budget(variants: Ways, name: str) -> dict[str, list[Record]]:
    """The ways of one name, which are several where chance drew several times, at each budget."""
    found: dict[str, list[Record]] = {}
    for variant in variants:
        if name_of(variant) == name:
            found.setdefault(budget_cell(variant), []).append(variant)
    return found


def scored(variants: Ways) -> str:
    """The score with its error; of several draws their mean, the lowest and the highest."""
    if len(variants) == 1:
        return score_cell(variants[0]["scores"]["all"])
    return spread([variant["scores"]["all"]["mean"] for variant in variants])


def compared(variants: Ways) -> str:
    """The difference to the first method with its interval; of several draws their mean, the lowest and the highest."""
    if len(variants) == 1:
        return difference_cell(variants[0]["differences"]["to_first"])
    return spread([variant["differences"]["to_first"]["mean"] for variant in variants])


def spread(means: Sequence[float]) -> str:
    return f"{100 * sum(means) / len(means):.1f} ({100 * min(means):.1f} to {100 * max(means):.1f})"


def curves(record: Record) -> list[dict[str, Any]]:
    """The points of the trade-off: a line a method, the draws of chance averaged."""
    variants = [variant for variant in record["methods"][1:] if variant["percent"] is not None]
    found = []
    for name in dict.fromkeys(map(name_of, variants)):
        for draws in by_budget(variants, name).values():
            scores = {
                kind: averaged([variant["scores"][kind] for variant in draws]) for kind in ("all", *record["kinds"])
            }
            found.append({**draws[0], "line": SHORT.get(name, name), "scores": scores})
    return found


#: Names that are too long for a figure's legend.
SHORT = {"one drop before layer 3, ranked as PyramidDrop ranks": "one drop before layer 3"}


def averaged(scores: Ways) -> Record:
    return {**scores[0], "mean": sum(one["mean"] for one in scores) / len(scores)}


def draw() -> Iterator[tuple[str, Figure]]:
    """The pictures, by name."""
    equal = json.loads((RESULTS / "reader-equal.json").read_text("utf-8"))
    yield "reader-redundancy", draw_redundancy(read("reader-redundancy")["models"], "accuracy")
    yield "reader-attention", attention_of(reader_checkpoint(), reader_task(limit=30), (1, 3, 6, 9))
    yield "reader-tradeoff", draw_tradeoff(equal["methods"][0], curves(equal))
    yield "reader-tradeoff-by-kind", draw_tradeoff_by_kind(equal["methods"][0], curves(equal), equal["kinds"])


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8"), written), "utf-8")
    save_pictures(dict(draw()))
