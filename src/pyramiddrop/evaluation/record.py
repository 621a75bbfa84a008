"""The record of an evaluation as plain values: scores, paired differences, cost and time of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pyramiddrop.evaluation.answering import Reply
from pyramiddrop.evaluation.kept_places import Place
from pyramiddrop.evaluation.run import SOLVERS, Budget, Evaluation, Outcome
from pyramiddrop.evaluation.scores import Difference, Score, difference, score, score_by_kind
from pyramiddrop.inference.prefill_stats import none_if_nan
from pyramiddrop.inference.timing import PrefillTime
from pyramiddrop.methods import Downsample
from pyramiddrop.scoring import RandomScorer
from pyramiddrop.speed.record import machine

#: The smallest number of pictures for a bootstrap over pictures; below it, differences have no interval.
FEWEST_PICTURES = 10


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """The record for JSON: FLOPs, bytes and seconds as means over the questions, with null for NaN.

    Intervals are null for fewer than ten pictures. Each method has

    - its budget, "percent" or "average_tokens";
    - differences "to_vanilla" and, except the first method, "to_first" at the same budget;
    - "agreement": the share of answers that equal vanilla's exactly;
    - "group_a": scores on the questions that downsampling at the same budget gets wrong (VTC-Bench's group A); null
      without downsampling, or if it gets all of them right;
    - "kept_place": the mean "row" and "column" of the tokens that the last drop kept, from 0 (upper or left edge) to 1;
      null if unknown;
    - "reading": scores on questions whose answer is "text" in the picture, and on all "other" ones; null if there is
      only one of both.

    "draws" has the mean, lowest and highest score over the seeds of each random method.
    """
    task, options, model = evaluation.task, evaluation.options, evaluation.checkpoint.model
    clusters = [sample.cluster for sample in task.samples]
    return {
        "task": {"name": task.name, **task.about, "match": task.match, "questions": len(task.samples)},
        "pictures": len(set(clusters)),
        "kinds": list(task.kinds),
        "subkinds": list(task.subkinds),
        "model": options.model or "bundled",
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": options.batch,
        "machine": machine(model.device, torch.get_num_threads()),
        "left_out": dict(evaluation.left_out),
        "draws": _draws(evaluation),
        "methods": [_variant(evaluation, number) for number in range(len(evaluation.outcomes))],
    }


def _variant(evaluation: Evaluation, number: int) -> dict[str, Any]:
    samples, vanilla, outcome = evaluation.task.samples, evaluation.outcomes[0], evaluation.outcomes[number]
    clusters = [sample.cluster for sample in samples]
    scores = score_by_kind(outcome.points, clusters, [sample.kind for sample in samples])
    finer = score_by_kind(outcome.points, clusters, [sample.subkind for sample in samples])
    return {
        "name": outcome.label,
        "method": outcome.method.settings() if outcome.method else None,
        **_budget(outcome.budget),
        "scores": {kind: _plain(scores[kind]) for kind in ("all", *evaluation.task.kinds)},
        "reading": _reading(evaluation, outcome, clusters),
        "subscores": {kind: _plain(finer[kind]) for kind in evaluation.task.subkinds},
        "differences": {
            name: _difference(difference(outcome.points, base.points, clusters), len(set(clusters)))
            for name, base in _bases(evaluation, outcome).items()
        },
        "agreement": _plain(score(_same(outcome, vanilla), clusters)),
        "group_a": _group_a(evaluation, outcome, clusters),
        "kept_place": _kept_place(outcome.replies),
        **_cost(outcome.replies, vanilla.replies, evaluation.checkpoint.num_layers),
        "prefill": _prefill(evaluation, number),
    }


def _draws(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The draws of each random method at each budget, if it has at least two seeds."""
    found: dict[tuple[str, Budget | None], list[float]] = {}
    for outcome in evaluation.outcomes:
        if outcome.method is not None and isinstance(outcome.method.scorer(), RandomScorer):
            found.setdefault((type(outcome.method).__name__, outcome.budget), []).append(float(outcome.points.mean()))
    return [
        {
            "name": name,
            **_budget(budget),
            "count": len(means),
            "mean": float(np.mean(means)),
            "low": min(means),
            "high": max(means),
        }
        for (name, budget), means in found.items()
        if len(means) > 1
    ]


def _budget(budget: Budget | None) -> dict[str, float | None]:
    return {kind: budget.limit if budget and budget.kind == kind else None for kind in SOLVERS}


def _same(outcome: Outcome, vanilla: Outcome) -> list[float]:
    """(N,) 1 if a reply equals vanilla's, else 0."""
    return [float(own.text == plain.text) for own, plain in zip(outcome.replies, vanilla.replies, strict=True)]


def _group_a(evaluation: Evaluation, outcome: Outcome, clusters: Sequence[str]) -> dict[str, Any] | None:
    smaller = [one for one in evaluation.outcomes if isinstance(one.method, Downsample)]
    own = [one for one in smaller if one.budget == outcome.budget] or smaller
    if not own or bool((own[0].points == 1).all()):
        return None
    wrong = own[0].points < 1
    return _plain(score(outcome.points[wrong], np.asarray(clusters)[wrong]))


def _reading(evaluation: Evaluation, outcome: Outcome, clusters: Sequence[str]) -> dict[str, Any] | None:
    reads = np.array([sample.reads_text for sample in evaluation.task.samples])
    if reads.all() or not reads.any():
        return None
    names = np.asarray(clusters)
    return {
        name: _plain(score(outcome.points[chosen], names[chosen]))
        for name, chosen in (("text", reads), ("other", ~reads))
    }


def _kept_place(replies: Sequence[Reply]) -> dict[str, float] | None:
    """The mean row and column of kept tokens over the questions with known places; None if there are none."""
    places = [reply.place for reply in replies if reply.place is not None]
    return dict(zip(Place._fields, np.mean(places, axis=0).tolist(), strict=True)) if places else None


def _prefill(evaluation: Evaluation, number: int) -> dict[str, float] | None:
    """Seconds of a prefill of the first batch, and their ratio to vanilla's; None if none was timed."""
    if evaluation.times is None:
        return None
    time, vanilla = evaluation.times[number], evaluation.times[0]
    return {**asdict(time), "ratio": _clock(evaluation, time) / _clock(evaluation, vanilla)}


def _bases(evaluation: Evaluation, outcome: Outcome) -> dict[str, Outcome]:
    """The references of a method: vanilla, and the first method at the same budget."""
    vanilla, *methods = evaluation.outcomes
    if outcome is vanilla:
        return {}
    first = next(one for one in methods if one.budget == outcome.budget)
    return {"to_vanilla": vanilla} if outcome is first else {"to_vanilla": vanilla, "to_first": first}


def _cost(replies: Sequence[Reply], vanilla: Sequence[Reply], layers: int) -> dict[str, Any]:
    """Means over the questions; the ratios are those of the sums."""
    used, plain = [reply.usage for reply in replies], [reply.usage for reply in vanilla]
    flops, kv_bytes = (np.mean([getattr(one, name) for one in used]) for name in ("flops", "kv_bytes"))
    stages = np.array([one.tokens_by_stage for one in used]).mean(0)
    drops = [stage.layer for stage in used[0].stages]
    return {
        "flops": none_if_nan(float(flops)),
        "flops_ratio": none_if_nan(float(flops / np.mean([one.flops for one in plain]))),
        "kv_bytes": none_if_nan(float(kv_bytes)),
        "kv_ratio": none_if_nan(float(kv_bytes / np.mean([one.kv_bytes for one in plain]))),
        "visual_tokens": {
            "by_stage": [float(count) for count in stages],
            "drop_layers": drops,
            "per_layer": float(np.mean([one.by_layer(layers) for one in used])),
        },
    }


def _clock(evaluation: Evaluation, time: PrefillTime) -> float:
    """CPU time on a CPU, which other programs may share; else wall time."""
    return time.cpu if evaluation.checkpoint.model.device.type == "cpu" else time.wall


def _difference(value: Difference, pictures: int) -> dict[str, Any]:
    interval = {} if pictures >= FEWEST_PICTURES else {"low": None, "high": None}
    return {**_plain(value), **interval}


def _plain(value: Score) -> dict[str, Any]:
    return {name: none_if_nan(number) for name, number in asdict(value).items()}
