"""Attention on the picture by layer in the full model: as numbers, and as maps of a few prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.evaluation.prefill_replay import PrefillReplay
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.hf import inspect_model
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prompt import build_inputs, on_model
from pyramiddrop.methods import PyramidDrop

#: The share of the picture's attention whose tokens `attention_concentration` counts.
CONCENTRATION = 0.9
#: The number of layers that fit on a page.
MAX_LAYERS = 4


def single_drop(layer: int, keep: float) -> PyramidDrop:
    """PyramidDrop with a single drop before `layer`."""
    return PyramidDrop(layers=[layer], keep=[keep])


@torch.inference_mode()
def attention_by_layer(model: Any, inputs: Mapping[str, Any], layers: Sequence[int]) -> dict[int, list[Tensor]]:
    """For each of the 0-based `layers` (from 1 on) and each sample of a batch, the attention on its visual tokens.

    It is the attention of the prompt's last token (softmax over all keys, mean over heads) in the full model, by which
    a drop before that layer ranks. It works with any attention implementation.
    """
    info = inspect_model(model)
    replay = PrefillReplay(info, layers) if PrefillReplay.can_share(info) else None
    if replay:
        with replay.recorded():
            model(**inputs, use_cache=True)
    found = {}
    for layer in layers:
        with single_drop(layer, 0.5)(model) as trace, replay.replayed(layer) if replay else nullcontext():
            model(**inputs, **({"use_cache": True} if replay else {}))
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
    """One prompt with its answer and the attention `scores` by layer, (N,) each, to be drawn.

    The model's configuration, the processor, and its output `inputs` for the prompt place the tokens in the picture.
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
    model, processor, examples = checkpoint.model, checkpoint.processor, []
    for sample in samples:
        inputs = build_inputs(processor, list(sample.images), sample.question)
        (answer,) = answer_greedily(checkpoint, inputs, max_new_tokens)
        found = attention_by_layer(model, on_model(model, inputs), spread_layers(layers))
        scores = {layer: of_samples[0] for layer, of_samples in found.items() if of_samples}
        examples.append(AttentionExample(sample, answer, scores, model.config, processor, inputs))
    return examples


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
