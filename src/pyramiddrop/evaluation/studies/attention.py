"""Owns the attention on the picture, layer by layer: what the last instruction token looks at in the full model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.evaluation.studies.grid import single_drop
from pyramiddrop.hf import anatomy
from pyramiddrop.hf.prefix import Prefix

#: The part of the picture's attention whose tokens are counted by `crowd`.
MOST = 0.9


@torch.inference_mode()
def attention_by_layer(model: Any, inputs: Mapping[str, Any], layers: Sequence[int]) -> dict[int, list[Tensor]]:
    """For each of the 0-based `layers` (from 1 on), for each sample: the attention on each of its visual tokens.

    It is that of the prompt's last token, a softmax over all keys, averaged over heads, in a model that has dropped
    nothing so far: what a drop before that layer ranks by. Any attention implementation will do.

    Args:
        inputs: of a prompt, on the model's device.
    """
    prefix, shares = Prefix(anatomy(model), layers), Prefix.can_share(anatomy(model))
    if shares:
        with prefix.recorded():
            model(**inputs, use_cache=True)
    found = {}
    for layer in layers:
        with single_drop(layer, 0.5)(model) as trace:
            if shares:
                with prefix.replayed(layer):
                    model(**inputs, use_cache=True)
            else:
                model(**inputs)
        found[layer] = trace.stages[0].scores or []
    return found


def on_picture(scores: Tensor) -> float:
    """The part of all attention that goes to the visual tokens, of which these (N,) are the scores."""
    return float(scores.double().sum())


def crowd(scores: Tensor) -> float:
    """The smallest share of the visual tokens that gets nine tenths of the attention on the picture."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    held = int(torch.searchsorted(ordered, MOST * ordered[-1])) + 1
    return min(held, len(ordered)) / len(ordered)
