"""Makes the tables and pictures of docs/studies.md from benchmarks/results; see there which command made each file.

python benchmarks/studies_document.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from speed_document import RESULTS, ROOT, filled

from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.studies.attention import attention_examples, pick_samples
from pyramiddrop.evaluation.tasks import Task, digits_task
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.report.studies.ablation import ablation_sheets, draw_ablation
from pyramiddrop.report.studies.paper_figure import styled
from pyramiddrop.report.studies.redundancy_plot import draw_attention, draw_redundancy
from pyramiddrop.report.studies.redundancy_report import attention_maps, redundancy_sheets
from pyramiddrop.report.studies.study import Sheet
from pyramiddrop.report.studies.tradeoff import draw_tradeoff, draw_tradeoff_by_kind, tradeoff_sheets
from pyramiddrop.report.tables.evaluation import difference_cell, score_cell

DOCUMENT = ROOT / "docs" / "studies.md"
IMAGES = ROOT / "docs" / "images"

Record = dict[str, Any]


def written(record: Record) -> str:
    """The tables of one record, each under its title."""
    return "\n\n".join(f"*{sheet.title}*\n\n{sheet.markdown()}" for sheet in SHEETS[record["study"]](record))


def prefix_sheets(record: Record) -> list[Sheet]:
    rows = [
        (what, f"{one['plain']:.1f} s", f"{one['shared']:.1f} s", f"{one['plain'] / one['shared']:.1f}")
        for what, one in record["seconds"].items()
    ]
    title = f"CPU seconds of {record['cells']} cells and the full model, {record['questions']} questions"
    return [Sheet(title, ("", "each from the start", "shared", "times"), rows)]


def planned_sheets(record: Record) -> list[Sheet]:
    head = (
        "schedule of the profile",
        "decoder FLOPs",
        "loss, predicted",
        "loss, measured",
        "accuracy (%)",
        "equal stages",
        "accuracy (%)",
        "difference",
    )
    rows = [
        (
            f"`{row['planned']}`",
            f"{row['flops_percent']:.1f} %",
            f"{100 * row['predicted_loss']:.1f}",
            difference_cell(row["loss"]).replace("+", ""),
            score_cell(row["accuracy"]),
            f"`{row['equal_stages']}`",
            score_cell(row["equal_accuracy"]),
            difference_cell(row["difference"]),
        )
        for row in record["rows"]
    ]
    return [Sheet(f"on the {record['questions']} questions of the test split", head, rows)]


SHEETS = {
    "redundancy": redundancy_sheets,
    "tradeoff": lambda record: tradeoff_sheets(record)[:1],  # the kinds are in the picture
    "ablation": ablation_sheets,
    "prefix": prefix_sheets,
    "planned": planned_sheets,
}


def draw() -> dict[str, Figure]:
    """The pictures, by name."""
    alone, models, tradeoff, ablation = map(read, ("redundancy", "models", "tradeoff", "ablation"))
    vanilla, *points = tradeoff["methods"]
    plain, *lambdas = ablation["methods"]
    return {
        "redundancy": draw_redundancy(alone["models"], "accuracy"),
        "models": draw_redundancy(models["models"], "accuracy"),
        "attention": attention_of(digits_checkpoint(), digits_task(limit=48), (1, 2, 3, 4, 5, 6, 7)),
        "tradeoff": draw_tradeoff(vanilla, points),
        "tradeoff-by-kind": draw_tradeoff_by_kind(vanilla, points, tradeoff["kinds"]),
        "ablation": draw_ablation(plain, lambdas, ablation["kinds"]),
    }


def attention_of(model: Path, task: Task, layers: Sequence[int]) -> Figure:
    """Maps of what three prompts of a bundled model attend to."""
    examples = attention_examples(load_checkpoint(model, "cpu"), pick_samples(task.samples, 3), layers, 5)
    return draw_attention(attention_maps(examples)[0])


def read(name: str) -> Record:
    record: Record = json.loads((RESULTS / f"study-{name}.json").read_text("utf-8"))
    return record


def save_pictures(figures: Mapping[str, Figure]) -> None:
    """Write them beside the documents, in 256 colours: a fourth of the bytes."""
    for name, figure in figures.items():
        path = IMAGES / f"study-{name}.png"
        with rc_context(styled()):
            figure.savefig(path, facecolor="white", dpi=150)
        picture = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        picture.save(path, optimize=True)


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8"), written), "utf-8")
    save_pictures(draw())
