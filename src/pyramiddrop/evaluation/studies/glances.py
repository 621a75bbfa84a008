"""Owns glances: for a few prompts, what a model answered and what it looked at, layer by layer, ready to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.studies.attention import attention_by_layer
from pyramiddrop.inference.answer import answer_greedily, on_model
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prompt import build_inputs

#: Layers that are drawn: as many as find room on a page.
MOST = 4


@dataclass(frozen=True)
class Glance:
    """One prompt.

    Attributes:
        scores: for each layer the attention on each visual token, (N,).
        config, processor, inputs: the model's, the checkpoint's, and what the processor made of the prompt; they tell
            where in the picture a token is.
    """

    sample: Sample
    answer: str
    scores: dict[int, Tensor]
    config: Any
    processor: Any
    inputs: Any = None


def take_glances(
    checkpoint: Checkpoint, samples: Sequence[Sample], layers: Sequence[int], max_new_tokens: int
) -> list[Glance]:
    """A glance at each of `samples`, at a few of `layers` from the first to the last."""
    chosen = few(layers)
    return [_glance(checkpoint, sample, chosen, max_new_tokens) for sample in samples]


def pick_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, or as many as there are: of other pictures and other kinds as long as there are some."""
    picked: list[Sample] = []
    for _ in range(min(count, len(samples))):
        clusters, kinds = [one.cluster for one in picked], [one.kind for one in picked]
        left = [one for one in samples if not any(one is other for other in picked)]
        picked.append(min(left, key=lambda one: (clusters.count(one.cluster), kinds.count(one.kind))))
    return picked


def few(layers: Sequence[int]) -> list[int]:
    """At most MOST of `layers`, evenly from the first to the last."""
    if len(layers) <= MOST:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (MOST - 1))] for place in range(MOST)]


def _glance(checkpoint: Checkpoint, sample: Sample, layers: Sequence[int], max_new_tokens: int) -> Glance:
    inputs = build_inputs(checkpoint.processor, list(sample.images), sample.question)
    (answer,) = answer_greedily(checkpoint, inputs, max_new_tokens)
    scores = attention_by_layer(checkpoint.model, on_model(checkpoint.model, inputs), layers)
    return Glance(
        sample,
        answer,
        {layer: found[0] for layer, found in scores.items() if found},
        checkpoint.model.config,
        checkpoint.processor,
        inputs,
    )
