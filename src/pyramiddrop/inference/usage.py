"""Owns the account of one prefill: visual tokens after each drop, FLOPs, and bytes of KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyramiddrop.cost import kv_bytes, prefill_flops
from pyramiddrop.hf.anatomy import anatomy
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class StageUse:
    """How many visual tokens stay from `layer` on."""

    layer: int
    keep: float
    tokens: int


@dataclass(frozen=True)
class Usage:
    """What one prefill of one prompt used.

    Attributes:
        visual_tokens: what the pictures brought.
        stages: the drops; none without a method.
        flops: of the decoder's layers, predicted by the cost model; a multiply-add is 2.
        kv_bytes: of the cache after the prefill.

    Both are NaN for a text model that the cost model does not know.
    """

    visual_tokens: int
    stages: tuple[StageUse, ...]
    flops: float
    kv_bytes: float

    @property
    def tokens_by_stage(self) -> list[int]:
        """Visual tokens at the start, then after each drop."""
        return [self.visual_tokens, *(stage.tokens for stage in self.stages)]


def usage(trace: Trace) -> Usage:
    """The account of the last prefill (of a single sample) in `trace`."""
    stages = tuple(StageUse(stage.layer, stage.keep, len(stage.kept[0])) for stage in trace.stages)
    if not trace.has_sizes:
        return Usage(trace.visual_tokens[0], stages, math.nan, math.nan)
    cost = trace.cost()
    return Usage(trace.visual_tokens[0], stages, cost.flops, cost.kv_bytes)


def vanilla_usage(model: Any, inputs: Mapping[str, Any]) -> Usage:
    """The account of a prefill of `inputs` (a single sample) in which nothing is dropped."""
    parts = anatomy(model)
    ids = inputs["input_ids"]
    visual = int(torch.isin(ids, torch.tensor(parts.visual_ids, device=ids.device)).sum())
    if parts.sizes is None:
        return Usage(visual, (), math.nan, math.nan)
    lengths = [ids.shape[1]] * parts.sizes.layers
    return Usage(visual, (), prefill_flops(parts.sizes, lengths), kv_bytes(parts.sizes, lengths))


def known(number: float) -> float | None:
    """The number, or None where it is not known: JSON has no NaN."""
    return None if math.isnan(number) else number
