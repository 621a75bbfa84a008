"""Attention on the picture by layer in the full model: as numbers, and as maps of a few prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.evaluation.prefill_replay import PrefillReplay
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.studies.inputs import single_drop
from pyramiddrop.hf import inspect_model
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prompt import build_inputs, on_model

#: The share of the picture's attention whose tokens `attention_concentration` counts.
CONCENTRATION = 0.9
#: The number of layers that fit on a page.
MAX_LAYERS = 4


@torch.inference_mode()
def attention_by_layer(model: Any, inputs: Mapping[str, Any], layers: Sequence[int]) -> dict[int, list[Tensor]]:
    """For each of the 0-based `layers` (from 1 on) and each sample, the attention on its visual tokens.

    It is the attention of the prompt's last token (softmax over all keys, mean over heads) in the full model, by which
    a drop before that layer ranks. It works with any attention implementation.

    Args:
        inputs: the model's inputs for a batch of prompts, on its device.
    """
    replay, shares = PrefillReplay(inspect_model(model), layers), PrefillReplay.can_share(inspect_model(model))
    if shares:
        with replay.recorded():
            model(**inputs, use_cache=True)
    found = {}
    for layer in layers:
        with single_drop(layer, 0.5)(model) as trace:
            if shares:
                with replay.replayed(layer):
                    model(**inputs, use_cache=True)
            else:
                model(**inputs)
        found[layer] = trace.stages[0].scores or []
    return found


def attention_on_picture(scores: Tensor) -> float:
    """The share of the attention that all visual tokens together receive, given their scores (N,)."""
    return float(scores.double().sum())


def attention_concentration(scores: Tensor) -> float:
    """The smallest share of the visual tokens that receives nine tenths of the attention on the picture."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    held = int(torch.searchsorted(ordered, CONCENTRATION * ordered[-1])) + 1
    return min(held, len(ordered)) / len(ordered)


@dataclass(frozen=True)
class AttentionExample:
    """One prompt with its answer and the attention on each visual token by layer, to be drawn.

    Attributes:
        scores: layer -> (N,) the attention on each visual token.
        config, processor, inputs: the model's configuration, the processor, and its output for the prompt, which place
            the tokens in the picture.
    """

    sample: Sample
    answer: str
    scores: dict[int, Tensor]
    config: Any
    processor: Any
    inputs: Any = None


def attention_examples(
    checkpoint: Checkpoint, samples: Sequence[Sample], layers: Sequence[int], max_new_tokens: int
) -> list[AttentionExample]:
    """One example for each of `samples`, at a few of `layers` from the first to the last."""
    chosen = spread_layers(layers)
    return [_example(checkpoint, sample, chosen, max_new_tokens) for sample in samples]


def pick_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, of different pictures and kinds as far as possible."""
    picked: list[Sample] = []
    for _ in range(min(count, len(samples))):
        clusters, kinds = [one.cluster for one in picked], [one.kind for one in picked]
        left = [one for one in samples if not any(one is other for other in picked)]
        picked.append(min(left, key=lambda one: (clusters.count(one.cluster), kinds.count(one.kind))))
    return picked


def spread_layers(layers: Sequence[int]) -> list[int]:
    """At most MAX_LAYERS of `layers`, evenly spaced from the first to the last."""
    if len(layers) <= MAX_LAYERS:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (MAX_LAYERS - 1))] for place in range(MAX_LAYERS)]


def _example(checkpoint: Checkpoint, sample: Sample, layers: Sequence[int], max_new_tokens: int) -> AttentionExample:
    inputs = build_inputs(checkpoint.processor, list(sample.images), sample.question)
    (answer,) = answer_greedily(checkpoint, inputs, max_new_tokens)
    scores = attention_by_layer(checkpoint.model, on_model(checkpoint.model, inputs), layers)
    return AttentionExample(
        sample,
        answer,
        {layer: found[0] for layer, found in scores.items() if found},
        checkpoint.model.config,
        checkpoint.processor,
        inputs,
    )
