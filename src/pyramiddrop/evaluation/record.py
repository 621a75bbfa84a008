"""The record of an evaluation as plain values: scores, paired differences, cost and time of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pyramiddrop.evaluation.answering import Place, Reply
from pyramiddrop.evaluation.budgets import PERCENT, TOKENS, Budget
from pyramiddrop.evaluation.run import Evaluation, Outcome
from pyramiddrop.evaluation.scores import Array, difference, score, score_by_kind
from pyramiddrop.inference.prefill_stats import none_if_nan
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
    task, vanilla, outcome = evaluation.task, evaluation.outcomes[0], evaluation.outcomes[number]
    points, clusters = outcome.points, np.array([sample.cluster for sample in task.samples])
    scores = score_by_kind(points, clusters, [sample.kind for sample in task.samples])
    finer = score_by_kind(points, clusters, [sample.subkind for sample in task.samples])
    reads = np.array([sample.reads_text for sample in task.samples])
    parts = {"text": reads, "other": ~reads} if reads.any() and not reads.all() else {}
    wrong = _wrong_in_small(evaluation, outcome.budget)
    same = [one.text == plain.text for one, plain in zip(outcome.replies, vanilla.replies, strict=True)]
    places = [reply.place for reply in outcome.replies if reply.place is not None]
    prefill = None
    if evaluation.times is not None:
        # The ratio is that of CPU times on a CPU, which other programs may share.
        clock = "cpu" if evaluation.checkpoint.model.device.type == "cpu" else "wall"
        time, plain_time = asdict(evaluation.times[number]), asdict(evaluation.times[0])
        prefill = {**time, "ratio": time[clock] / plain_time[clock]}
    return {
        "name": outcome.label,
        "method": outcome.method.settings() if outcome.method else None,
        **_budget(outcome.budget),
        "scores": {kind: scores[kind].as_dict() for kind in ("all", *task.kinds)},
        "reading": {name: score(points[part], clusters[part]).as_dict() for name, part in parts.items()} or None,
        "subscores": {kind: finer[kind].as_dict() for kind in task.subkinds},
        "differences": _differences(evaluation, outcome, clusters),
        "agreement": score(same, clusters).as_dict(),
        "group_a": score(points[wrong], clusters[wrong]).as_dict() if wrong.any() else None,
        "kept_place": dict(zip(Place._fields, np.mean(places, axis=0).tolist(), strict=True)) if places else None,
        **_cost(outcome.replies, vanilla.replies, evaluation.checkpoint.num_layers),
        "prefill": prefill,
    }


def _draws(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The draws of each random method at each budget, if it has at least two seeds."""
    found: dict[tuple[str, Budget | None], list[float]] = {}
    for outcome in evaluation.outcomes:
        if outcome.method is not None and isinstance(outcome.method.scorer(), RandomScorer):
            found.setdefault((type(outcome.method).__name__, outcome.budget), []).append(float(outcome.points.mean()))
    return [
        {"name": name, **_budget(budget), "count": len(means), "mean": float(np.mean(means))}
        | {"low": min(means), "high": max(means)}
        for (name, budget), means in found.items()
        if len(means) > 1
    ]


def _budget(budget: Budget | None) -> dict[str, float | None]:
    return {kind: budget.limit if budget and budget.kind == kind else None for kind in (PERCENT, TOKENS)}


def _wrong_in_small(evaluation: Evaluation, budget: Budget | None) -> Array:
    """(N,) bool: the questions that downsampling gets wrong, at this budget if it ran at it."""
    smaller = [one for one in evaluation.outcomes if isinstance(one.method, Downsample)]
    own = [one for one in smaller if one.budget == budget] or smaller
    return own[0].points < 1 if own else np.zeros(len(evaluation.task.samples), bool)


def _differences(evaluation: Evaluation, outcome: Outcome, clusters: Array) -> dict[str, dict[str, Any]]:
    """The paired differences to vanilla, and to the first method at the same budget."""
    vanilla, *methods = evaluation.outcomes
    if outcome is vanilla:
        return {}
    first = next(one for one in methods if one.budget == outcome.budget)
    bases = {"to_vanilla": vanilla} if outcome is first else {"to_vanilla": vanilla, "to_first": first}
    unknown = {} if len(set(clusters)) >= FEWEST_PICTURES else {"low": None, "high": None}
    return {
        name: {**difference(outcome.points, base.points, clusters).as_dict(), **unknown} for name, base in bases.items()
    }


def _cost(replies: Sequence[Reply], vanilla: Sequence[Reply], layers: int) -> dict[str, Any]:
    """Means over the questions; the ratios are those of the sums."""
    used = [reply.usage for reply in replies]
    costs: dict[str, float | None] = {}
    for name, ratio in (("flops", "flops_ratio"), ("kv_bytes", "kv_ratio")):
        mean = np.mean([getattr(one, name) for one in used])
        plain = np.mean([getattr(reply.usage, name) for reply in vanilla])
        costs |= {name: none_if_nan(float(mean)), ratio: none_if_nan(float(mean / plain))}
    tokens = {
        "by_stage": np.array([one.tokens_by_stage for one in used]).mean(0).tolist(),
        "drop_layers": [stage.layer for stage in used[0].stages],
        "per_layer": float(np.mean([one.by_layer(layers) for one in used])),
    }
    return {**costs, "visual_tokens": tokens}
