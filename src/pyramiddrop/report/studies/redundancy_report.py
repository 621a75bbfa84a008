"""Report the redundancy study: curves by layer and keep ratio, attention by layer, and their tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.studies.attention import AttentionExample
from pyramiddrop.evaluation.studies.redundancy import profile_of
from pyramiddrop.report.studies.redundancy_plot import METRICS, AttentionMaps, draw_attention, draw_redundancy
from pyramiddrop.report.studies.study import Plot, Record, Sheet, Shown, small
from pyramiddrop.report.tables.evaluation import score_cell
from pyramiddrop.report.token_layout.views import place_pictures

LEAD = (
    "One drop of visual tokens, ranked by the attention from the prompt's last token, tried before each layer and with "
    "each share kept. The flatter a line, the more of the picture is redundant from that layer on. Bands and ± are one "
    "standard error, clustered by picture."
)
#: The largest loss at which dropped tokens count as redundant.
REDUNDANT = 0.01
ATTENTION = (
    "What the last token of the prompt attends to in {model}, a mean over heads, in the full model. Above each map: "
    "the part of all its attention that goes to the picture. The maps of a row share their colours, which go with the "
    "square root of the attention."
)


def show_redundancy(record: Record, looks: Sequence[AttentionMaps] = ()) -> Shown:
    """Build the figures and tables of a study's `record`, and attention maps of `looks`, if any."""
    models = record["models"]
    metrics = _metrics(models)
    plots = [Plot(f"redundancy-{one}", METRICS[one].caption, draw_redundancy(models, one)) for one in metrics]
    if looks:
        plots.append(Plot("attention", ATTENTION.format(model=models[0]["name"]), draw_attention(looks)))
    return Shown(
        title="Where are visual tokens redundant?",
        conclusion=_conclusion(models[0]),
        lead=LEAD,
        plots=plots,
        sheets=redundancy_sheets(record),
        remarks=[_vanilla(model) for model in models],
        numbers=[row for model in models for row in _numbers(model, metrics)],
    )


def _conclusion(model: Record) -> str:
    """A sentence on the layers from which the largest and the smallest keep ratio are enough."""
    metric, whole = "agreement", 1.0
    if model["vanilla"]["accuracy"]:
        metric, whole = "accuracy", model["vanilla"]["accuracy"]["mean"]
    shares = sorted({cell["keep"] for cell in model["cells"] if cell["keep"] < 1})
    ends = dict.fromkeys((shares[-1], shares[0])) if shares else {1.0: None}
    said = " and ".join(f"{100 * share:.3g} % {_enough(model, metric, whole, share)}" for share in ends)
    points = f"{100 * REDUNDANT:g} point of {'accuracy' if metric == 'accuracy' else 'agreement with the full model'}"
    return f"Of the visual tokens of {model['name']} {said}, if a loss of up to {points} counts as none."


def _enough(model: Record, metric: str, whole: float, share: float) -> str:
    """`are enough from layer 6 on`: the first layer from which no measured layer loses more than allowed."""
    cells = sorted((cell for cell in model["cells"] if cell["keep"] == share), key=lambda cell: -cell["layer"])
    enough = list(takewhile(lambda cell: whole - cell[metric]["mean"] <= REDUNDANT, cells))
    return f"are enough from layer {enough[-1]['layer']} on" if enough else "are enough at no layer"


def redundancy_sheets(record: Record) -> list[Sheet]:
    """The tables: a metric by layer and keep ratio, for each metric and model; and each model's attention."""
    models = record["models"]
    sheets = [_cells(model, metric) for metric in _metrics(models) for model in models]
    return [*sheets, *(_attention(model) for model in models if model["attention"])]


def attention_maps(examples: Sequence[AttentionExample]) -> tuple[list[AttentionMaps], str]:
    """The attention maps that can be drawn, and the reason if none can."""
    try:
        maps = [
            AttentionMaps(
                title=f"{one.sample.question} → {one.answer}",
                seen=place_pictures(one.config, one.processor, list(one.sample.images), one.inputs),
                scores={layer: scores.double().numpy() for layer, scores in one.scores.items()},
            )
            for one in examples
            if one.scores
        ]
        return maps, ""
    except ValueError as error:  # a family whose visual tokens have no known place in the picture
        return [], str(error)


def write_profiles(record: Record, folder: Path) -> list[Path]:
    """Write a redundancy profile of each model: `profile.json`, or `profile-NAME.json` for several."""
    models = record["models"]
    plain = [re.sub(r"[^\w.-]+", "-", model["name"]) for model in models]
    paths = []
    for number, (model, name) in enumerate(zip(models, plain, strict=True), start=1):
        own = f"-{name}-{number}" if plain.count(name) > 1 else f"-{name}"  # a number if two names would be equal
        paths.append(folder / f"profile{own if len(models) > 1 else ''}.json")
        paths[-1].write_text(json.dumps(profile_of(model), indent=1) + "\n", encoding="utf-8")
    return paths


def _metrics(models: Sequence[Record]) -> list[str]:
    """The measured metrics; accuracy needs known answers."""
    return [metric for metric in METRICS if any(cell[metric] for cell in models[0]["cells"])]


def _cells(model: Record, metric: str) -> Sheet:
    """A row for each layer and a column for each keep ratio."""
    cells = {(cell["layer"], cell["keep"]): cell[metric] for cell in model["cells"]}
    layers = sorted({cell["layer"] for cell in model["cells"]})
    shares = sorted({cell["keep"] for cell in model["cells"]}, reverse=True)
    written = score_cell if METRICS[metric].part else small
    rows = [(str(layer), *(written(cells[layer, share]) for share in shares)) for layer in layers]
    head = ("before layer", *(f"keep {100 * share:.3g} %" for share in shares))
    return Sheet(f"{model['name']}: {METRICS[metric].label}", head, rows)


def _attention(model: Record) -> Sheet:
    rows = [(str(one["layer"]), score_cell(one["picture"]), score_cell(one["crowd"])) for one in model["attention"]]
    head = ("layer", "attention on the picture (%)", "visual tokens that get 90 % of that (%)")
    return Sheet(f"{model['name']}: what the prompt's last token attends to", head, rows)


def _vanilla(model: Record) -> str:
    about = f"{model['name']}: {model['samples']} samples, {model['visual_tokens']:.4g} visual tokens on average"
    accuracy = model["vanilla"]["accuracy"]
    return f"{about}; without a drop {score_cell(accuracy)} %." if accuracy else f"{about}; no right answers are known."


def _numbers(model: Record, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each cell, metric and kind of question; rows of the full model have no layer."""
    full = model["vanilla"]
    yield from _rows({"model": model["name"], "layer": "", "keep": 1, "flops_ratio": 1}, full, ["accuracy"])
    for cell in model["cells"]:
        about = {"model": model["name"], **{name: cell[name] for name in ("layer", "keep", "flops_ratio")}}
        yield from _rows(about, cell, metrics)


def _rows(about: Record, scored: Record, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    for metric in metrics:
        if scored[metric]:
            yield {**about, "metric": metric, "kind": "all", **scored[metric]}
    for kind, one in scored["by_kind"].items():
        yield {**about, "metric": "accuracy", "kind": kind, **one}
