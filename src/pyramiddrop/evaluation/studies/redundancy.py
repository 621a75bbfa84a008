"""The redundancy study (the paper's Figures 1 and 3): a single drop at every layer and keep ratio, and its profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.prefill_replay import PrefillReplay, generate_with_logits, replays_exactly
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.scores import score, score_by_kind
from pyramiddrop.evaluation.store import Journal, Store
from pyramiddrop.evaluation.studies.attention import (
    AttentionExample,
    attention_concentration,
    attention_examples,
    attention_on_picture,
    pick_samples,
    single_drop,
)
from pyramiddrop.evaluation.tasks import MATCHES, Task
from pyramiddrop.hf import UnsupportedModelError, inspect_model
from pyramiddrop.hf.model_info import ModelInfo, check_layers, drop_layers
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import load_checkpoint, read_config
from pyramiddrop.inference.prefill_stats import Usage, batch_usage, none_if_nan
from pyramiddrop.inference.prompt import on_model
from pyramiddrop.scoring import AttentionScorer
from pyramiddrop.speed.record import machine

BUNDLED = "bundled"
DEFAULT_KEEP = (0.5, 0.25, 0.125, 1 / 64)

#: The results of one batch: lists with a value for each sample.
BatchRecord = dict[str, Any]
#: A value for each sample; None if there is nothing to score.
Values = Sequence[float | None]


@dataclass(frozen=True)
class Grid:
    """0-based `layers`, ascending, and keep ratios `keep`, descending."""

    layers: tuple[int, ...]
    keep: tuple[float, ...]

    @property
    def cells(self) -> list[tuple[int, float]]:
        """All (layer, keep), layer by layer."""
        return [(layer, keep) for layer in self.layers for keep in self.keep]


def make_grid(info: ModelInfo, layers: Sequence[int] | None = None, keep: Sequence[float] | None = None) -> Grid:
    """The grid for a model: the user's values, or else `usual_layers` and keep ratios from 1/2 to 1/64.

    InputError for a layer before which the model cannot drop, or a keep ratio outside (0, 1].
    """
    allowed, depth = drop_layers(info, "next", AttentionScorer()), len(info.layers)
    chosen = usual_layers(depth, allowed) if layers is None else tuple(sorted(set(layers)))
    shares = tuple(sorted(set(DEFAULT_KEEP if keep is None else keep), reverse=True))
    if not chosen or not shares:
        raise InputError("the grid needs at least one layer and one share")
    if shares[-1] == 0:
        raise InputError("keep must be in (0, 1]: at 0 no token is chosen, and the study is about the choice; got 0")
    for layer in chosen:
        for share in shares:
            with user_input():
                single_drop(layer, share).schedule(depth)
    with user_input():
        check_layers(info, chosen, "next", AttentionScorer())
    return Grid(chosen, shares)


def usual_layers(depth: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """The eighths of the depth and its sixteenth, if `allowed`: 2, 4, 8, ..., 28 of 32, with those of Figure 3."""
    wanted = {depth // 16, *(depth * eighth // 8 for eighth in range(1, 8))}
    return tuple(sorted(wanted & set(allowed))) or tuple(allowed)


@dataclass(frozen=True)
class Redundancy:
    """The study of one model: its name in the study, and its source (a folder or a name on the hub)."""

    name: str
    source: str
    answerer: Answerer
    task: Task  # its questions need no answers
    grid: Grid
    share: bool = True  # run the layers before a drop once for all keep ratios, if possible; the numbers are the same

    @property
    def steps(self) -> int:
        """The total number of answered batches."""
        return -(-len(self.task.samples) // self.answerer.batch) * (1 + len(self.grid.cells))

    def run(self, folder: Path, advance: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
        """Run the study and return its record; results in `folder` are reused (InputError if it cannot be used)."""
        samples, batch = self.task.samples, self.answerer.batch
        key = {**Store(folder, self.answerer, samples).shared, "layers": self.grid.layers, "keep": self.grid.keep}
        journal = Journal(folder, "redundancy", key)
        measured = journal.entries()
        journal.keep(measured)
        advance(len(measured) * (1 + len(self.grid.cells)))
        for start in range(len(measured) * batch, len(samples), batch):
            measured.append(self._measure(samples[start : start + batch], advance))
            journal.append(measured[-1:])
        about = {"name": self.name, "source": self.source, "num_layers": self.answerer.checkpoint.num_layers}
        return {**about, **_record(self.task, self.grid, measured)}

    @cached_property
    def shared(self) -> bool:
        """True if prefills can be replayed: on the first sample, a replayed one must be bit-identical."""
        layer, keep = self.grid.layers[-1], self.grid.keep[-1]
        inputs, tokens = self._inputs(self.task.samples[:1]), self.answerer.max_new_tokens
        method = single_drop(layer, keep)
        return self.share and replays_exactly(self.answerer.checkpoint, inputs, method, layer, tokens)

    def _measure(self, samples: Sequence[Sample], advance: Callable[[int], None]) -> BatchRecord:
        """The answers of a batch without dropping and in every cell, and its attention."""
        model, inputs = self.answerer.checkpoint.model, self._inputs(samples)
        replay = PrefillReplay(inspect_model(model), self.grid.layers) if self.shared else None
        with replay.recorded() if replay else nullcontext():
            full, full_logits = self._generate(inputs)
        advance(1)
        cells: list[BatchRecord] = []
        looks: dict[int, list[Tensor] | None] = {}
        for layer, keep in self.grid.cells:
            method = single_drop(layer, keep)
            with method(model) as trace, replay.replayed(layer) if replay else nullcontext():
                answers, logits = self._generate(inputs)
            flops = _flops(batch_usage(model, inputs, method, trace))
            top1, kl = top1_match(full_logits, logits).double(), kl_divergence_to(full_logits, logits)
            cells.append({"answers": answers, "flops": flops, "top1": top1.tolist(), "kl": kl.tolist()})
            looks[layer] = trace.stages[0].scores or looks.get(layer)
            advance(1)
        attention = []
        for layer, scores in looks.items():
            if scores is not None:
                picture, crowd = map(attention_on_picture, scores), map(attention_concentration, scores)
                attention.append({"layer": layer, "picture": [*picture], "crowd": [*crowd]})
        return {
            "shared": self.shared,
            "answers": full,
            "flops": _flops(batch_usage(model, inputs)),
            "visual_tokens": trace.visual_tokens,
            "cells": cells,
            "attention": attention,
        }

    def _inputs(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        return on_model(self.answerer.checkpoint.model, self.answerer.inputs(samples))

    def _generate(self, inputs: Mapping[str, Any]) -> tuple[list[str], Tensor]:
        return generate_with_logits(self.answerer.checkpoint, inputs, self.answerer.max_new_tokens)


def _flops(used: Sequence[Usage]) -> list[float | None]:
    return [none_if_nan(one.flops) for one in used]


def kl_divergence_to(full: Tensor, dropped: Tensor) -> Tensor:
    """(B,) float64, KL(full || dropped) in nats of the next-token distributions with these logits, (B, V) each."""
    distributions = (Categorical(logits=logits.double()) for logits in (full, dropped))
    return kl_divergence(*distributions).clamp(min=0)  # rounding can make it slightly negative


def top1_match(full: Tensor, dropped: Tensor) -> Tensor:
    """(B,) bool, True if the most likely next token is the same, by logits (B, V)."""
    return full.argmax(-1) == dropped.argmax(-1)


#: Called with a description and the number of steps; returns a function to call with the number of finished ones.
Begin = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class StudyModel:
    """A model of a study: its name there, its source (a folder, a name on the hub, or "bundled") and its place."""

    name: str
    source: str
    place: str | Path


def study_models(sources: Sequence[str], names: Sequence[str], bundled: Path) -> list[StudyModel]:
    """The models of a study, named by the last part of their sources by default.

    InputError if there are not as many names as models, or two are equal.
    """
    sources = sources or [BUNDLED]
    if names and len(names) != len(sources):
        raise InputError(f"give one --name for each --model; got {len(names)} for {len(sources)}")
    found = [name.strip() for name in names] or [Path(source).name or source for source in sources]
    if len(set(found)) < len(found) or not all(found):
        raise InputError(f"models need different names (--name); got {', '.join(map(repr, found))}")
    places = [bundled if source == BUNDLED else source for source in sources]
    return list(map(StudyModel, found, sources, places))


@dataclass(frozen=True)
class RedundancyOptions:
    """The options of a redundancy study."""

    models: Sequence[StudyModel]
    layers: Sequence[int] | None = None  # None: `usual_layers`
    keep: Sequence[float] | None = None  # None: DEFAULT_KEEP
    batch: int = 16
    max_new_tokens: int = 32
    examples: int = 2  # number of drawn prompts
    device: str | None = None
    dtype: str | None = None


def run_redundancy(
    task: Task, options: RedundancyOptions, folder: Path, begin: Begin
) -> tuple[dict[str, Any], list[AttentionExample]]:
    """Run the study and return its record, and examples of its first model; InputError if an option cannot be used."""
    for model in options.models:  # before any weights are read
        read_config(model.place)
    setting = {
        "task": task.name,
        **task.about,
        "match": task.match,
        "models": {model.name: model.source for model in options.models},
        "layers": options.layers or "each eighth of the depth",
        "keep": options.keep or DEFAULT_KEEP,
        "batch": options.batch,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype or "by device",
    }
    record: dict[str, Any] = {"study": "redundancy", "setting": setting, "models": []}
    examples: list[AttentionExample] = []
    for number, model in enumerate(options.models):
        checkpoint = load_checkpoint(model.place, options.device, options.dtype)
        with user_input(caught=(UnsupportedModelError,)):
            info = inspect_model(checkpoint.model)
        grid = make_grid(info, options.layers, options.keep)
        answerer = Answerer(checkpoint, options.batch, options.max_new_tokens)
        study = Redundancy(model.name, model.source, answerer, task, grid)
        with user_input():
            record["models"].append(study.run(folder, begin(model.name, study.steps)))
        if number == 0:
            picked = pick_samples(task.samples, options.examples)
            examples = attention_examples(checkpoint, picked, grid.layers, options.max_new_tokens)
            record["machine"] = machine(checkpoint.model.device, torch.get_num_threads())
    return record, examples


def _record(task: Task, grid: Grid, batches: Sequence[BatchRecord]) -> dict[str, Any]:
    """The full model's scores, those of every cell, and the attention by layer."""
    means, full, vanilla_flops = Means(task.samples), _joined(batches, "answers"), _joined(batches, "flops")
    right = _right(task, full)
    cells = []
    for place, (layer, keep) in enumerate(grid.cells):
        parts = [batch["cells"][place] for batch in batches]
        answers = _joined(parts, "answers")
        accuracy = _right(task, answers)
        agreement = [float(one == other) for one, other in zip(answers, full, strict=True)]
        cells.append(
            {
                "layer": layer,
                "keep": keep,
                "accuracy": means.score(accuracy),
                "agreement": means.score(agreement),
                **{metric: means.score(_joined(parts, metric)) for metric in ("top1", "kl")},
                "by_kind": means.by_kind(accuracy),
                "flops_ratio": ratio(_joined(parts, "flops"), vanilla_flops),
            }
        )
    looks = [batch["attention"] for batch in batches]
    return {
        "samples": len(task.samples),
        "visual_tokens": float(np.mean(_joined(batches, "visual_tokens"))),
        "shared_prefix": all(batch["shared"] for batch in batches),
        "vanilla": {"accuracy": means.score(right), "by_kind": means.by_kind(right)},
        "cells": cells,
        "attention": [  # empty if some prompts had too few visual tokens to rank
            {"layer": of[0]["layer"], **{name: means.score(_joined(of, name)) for name in ("picture", "crowd")}}
            for of in (zip(*looks, strict=True) if all(looks) else ())
        ],
    }


def _right(task: Task, answers: Sequence[str]) -> list[float | None]:
    """The score of each answer; None if no right answer is known."""
    match, pairs = MATCHES[task.match], zip(answers, task.samples, strict=True)
    return [match(answer, sample.answers) if sample.answers else None for answer, sample in pairs]


def _joined(batches: Sequence[BatchRecord], name: str) -> list[Any]:
    return [value for batch in batches for value in batch[name]]


class Means:
    """Means over these samples; a sample without a cluster is a cluster of its own."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.kinds = np.array([sample.kind for sample in samples])
        self.clusters = np.array([sample.cluster or f"#{number}" for number, sample in enumerate(samples)])

    def score(self, values: Values) -> dict[str, Any] | None:
        """`mean`, its standard `error` (None for a single cluster) and `count`; None without values."""
        known = [value is not None for value in values]
        points = [value for value in values if value is not None]
        return score(points, self.clusters[known]).as_dict() if points else None

    def by_kind(self, values: Values) -> dict[str, dict[str, Any]]:
        """The same for each kind of question, if there are several."""
        known = [value is not None for value in values]
        kinds = self.kinds[known].tolist()
        if len(set(kinds)) < 2:
            return {}
        points = [value for value in values if value is not None]
        found = score_by_kind(points, self.clusters[known], kinds)
        return {kind: found[kind].as_dict() for kind in dict.fromkeys(kinds)}


def ratio(used: Values, vanilla: Values) -> float | None:
    """The usage of all samples relative to that without dropping; None if some number is unknown."""
    numbers, plain = [one for one in used if one is not None], [one for one in vanilla if one is not None]
    return sum(numbers) / sum(plain) if len(numbers) == len(used) and len(plain) == len(vanilla) else None


def profile_of(model: dict[str, Any]) -> dict[str, Any]:
    """The redundancy profile of one model of a study, as `pyramiddrop.planning.Profile` reads it.

    Its score is the accuracy if answers are known, else the agreement of whole answers with the full model's.
    """
    vanilla = model["vanilla"]["accuracy"]
    metric = "agreement" if vanilla is None else "accuracy"
    return {
        "model": model["name"],
        "source": model["source"],
        "samples": model["samples"],
        "num_layers": model["num_layers"],
        "vanilla": 1.0 if vanilla is None else vanilla["mean"],
        "cells": [
            {"layer": cell["layer"], "keep": cell["keep"], metric: cell[metric]["mean"]} for cell in model["cells"]
        ],
    }
