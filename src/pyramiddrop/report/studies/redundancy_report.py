"""Report the redundancy study: curves by layer and keep ratio, attention by layer, and their tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.studies.attention import AttentionExample
from pyramiddrop.evaluation.studies.redundancy import profile_of
from pyramiddrop.report.studies.redundancy_plot import AttentionMaps, draw_attention, draw_redundancy
from pyramiddrop.report.studies.study import Plot, Record, Sheet, Shown, percent, small
from pyramiddrop.report.token_layout.views import place_pictures

LEAD = (
    "One drop of visual tokens, ranked by the attention from the prompt's last token, tried before each layer and with "
    "each share kept. The flatter a line, the more of the picture is redundant from that layer on. Bands and ± are one "
    "standard error, clustered by picture."
)
#: The largest loss at which dropped tokens count as redundant.
REDUNDANT = 0.01
CAPTIONS = {
    "accuracy": "Accuracy over the share of visual tokens that one drop keeps, by the layer before which it drops.",
    "agreement": "Whole greedy answers that stay the same as the full model's. Needs no right answers.",
    "top1": "Prompts whose likeliest next token stays the full model's. Needs no right answers.",
    "kl": "Kullback-Leibler divergence of the next-token distribution from the full model's, which is 0 at "
    "100 %. Needs no right answers.",
}
TITLES = {
    "accuracy": "accuracy (%)",
    "agreement": "answers as the full model's (%)",
    "top1": "next token as the full model's (%)",
    "kl": "KL from the full model (nats)",
}


def show_redundancy(record: Record, looks: Sequence[AttentionMaps] = ()) -> Shown:
    """Build the figures and tables of a study's `record`, and attention maps of `looks`, if any."""
    models = record["models"]
    metrics = _metrics(models)
    plots = [Plot(f"redundancy-{metric}", CAPTIONS[metric], draw_redundancy(models, metric)) for metric in metrics]
    if looks:
        plots.append(Plot("attention", _attention_caption(models[0]["name"]), draw_attention(looks)))
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
    first = None
    for cell in sorted((cell for cell in model["cells"] if cell["keep"] == share), key=lambda cell: -cell["layer"]):
        if whole - cell[metric]["mean"] > REDUNDANT:
            break
        first = cell["layer"]
    return "are enough at no layer" if first is None else f"are enough from layer {first} on"


def redundancy_sheets(record: Record) -> list[Sheet]:
    """The tables: a metric by layer and keep ratio, for each metric and model; and each model's attention."""
    models = record["models"]
    sheets = [_cells(model, metric) for metric in _metrics(models) for model in models]
    return [*sheets, *(_attention(model) for model in models if model["attention"])]


def attention_maps(examples: Sequence[AttentionExample]) -> tuple[list[AttentionMaps], str]:
    """The attention maps that can be drawn, and the reason if none can."""
    try:
        return [_look(glance) for glance in examples if glance.scores], ""
    except ValueError as error:  # a family whose visual tokens have no known place in the picture
        return [], str(error)


def write_profiles(record: Record, folder: Path) -> list[Path]:
    """Write a redundancy profile of each model: `profile.json`, or `profile-NAME.json` for several."""
    models = record["models"]
    paths = [folder / name for name in _profile_names([model["name"] for model in models])]
    for path, model in zip(paths, models, strict=True):
        path.write_text(json.dumps(profile_of(model), indent=1) + "\n", encoding="utf-8")
    return paths


def _metrics(models: Sequence[Record]) -> list[str]:
    """The measured metrics; accuracy needs known answers."""
    return [metric for metric in CAPTIONS if any(cell[metric] for cell in models[0]["cells"])]


def _profile_names(models: Sequence[str]) -> list[str]:
    """File names after the names of models, with a number if two would be equal."""
    if len(models) == 1:
        return ["profile.json"]
    plain = [re.sub(r"[^\w.-]+", "-", name) for name in models]
    numbers = [f"-{number}" if plain.count(name) > 1 else "" for number, name in enumerate(plain, start=1)]
    return [f"profile-{name}{number}.json" for name, number in zip(plain, numbers, strict=True)]


def _look(glance: AttentionExample) -> AttentionMaps:
    return AttentionMaps(
        title=f"{glance.sample.question} → {glance.answer}",
        seen=place_pictures(glance.config, glance.processor, list(glance.sample.images), glance.inputs),
        scores={layer: scores.double().numpy() for layer, scores in glance.scores.items()},
    )


def _attention_caption(name: str) -> str:
    return (
        f"What the last token of the prompt attends to in {name}, a mean over heads, in the full model. Above each "
        "map: the part of all its attention that goes to the picture. The maps of a row share their colours, which go "
        "with the square root of the attention."
    )


def _cells(model: Record, metric: str) -> Sheet:
    """A row for each layer and a column for each keep ratio."""
    cells = {(cell["layer"], cell["keep"]): cell[metric] for cell in model["cells"]}
    layers, shares = (sorted({cell[name] for cell in model["cells"]}) for name in ("layer", "keep"))
    shares.reverse()
    written = small if metric == "kl" else percent
    rows = [(str(layer), *(written(cells[layer, share]) for share in shares)) for layer in layers]
    head = ("before layer", *(f"keep {100 * share:.3g} %" for share in shares))
    return Sheet(f"{model['name']}: {TITLES[metric]}", head, rows)


def _attention(model: Record) -> Sheet:
    rows = [(str(one["layer"]), percent(one["picture"]), percent(one["crowd"])) for one in model["attention"]]
    head = ("layer", "attention on the picture (%)", "visual tokens that get 90 % of that (%)")
    return Sheet(f"{model['name']}: what the prompt's last token attends to", head, rows)


def _vanilla(model: Record) -> str:
    about = f"{model['name']}: {model['samples']} samples, {model['visual_tokens']:.4g} visual tokens on average"
    accuracy = model["vanilla"]["accuracy"]
    return f"{about}; without a drop {percent(accuracy)} %." if accuracy else f"{about}; no right answers are known."


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
