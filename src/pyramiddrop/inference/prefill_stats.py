"""The cost of one prefill: visual tokens after each drop, FLOPs, and bytes of KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyramiddrop import Method
from pyramiddrop.cost import DecoderShape, DropCounts, Prompt, kv_bytes, prefill_flops
from pyramiddrop.hf.model_info import ModelInfo, inspect_model
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class StageTokens:
    """How many visual tokens stay from `layer` on."""

    layer: int
    keep: float
    tokens: int


@dataclass(frozen=True)
class Usage:
    """What one prefill of one prompt used.

    Attributes:
        visual_tokens: what the pictures brought.
        text_tokens: all others.
        stages: the drops; none without a method.
        flops: of the decoder's layers, predicted by the cost model; a multiply-add is 2.
        kv_bytes: of the cache after the prefill.

    Both are NaN for a text model that the cost model does not know.
    """

    visual_tokens: int
    text_tokens: int
    stages: tuple[StageTokens, ...]
    flops: float
    kv_bytes: float

    @property
    def tokens_by_stage(self) -> list[int]:
        """Visual tokens at the start, then after each drop."""
        return [self.visual_tokens, *(stage.tokens for stage in self.stages)]

    def by_layer(self, layers: int) -> list[int]:
        """Visual tokens in each of the model's `layers` layers."""
        counts = self.tokens_by_stage
        return [counts[sum(stage.layer <= layer for stage in self.stages)] for layer in range(layers)]


def usage(trace: Trace) -> Usage:
    """The account of the last prefill (of a single sample) in `trace`."""
    stages = tuple(StageTokens(stage.layer, stage.keep, len(stage.kept[0])) for stage in trace.stages)
    visual = trace.visual_tokens[0]
    text = trace.length - visual
    if not trace.has_sizes:
        return Usage(visual, text, stages, math.nan, math.nan)
    cost = trace.cost()
    return Usage(visual, text, stages, cost.flops, cost.kv_bytes)


def vanilla_usage(model: Any, inputs: Mapping[str, Any]) -> Usage:
    """The account of a prefill of `inputs` (a single sample) in which nothing is dropped."""
    return batch_usage(model, inputs)[0]


def batch_usage(
    model: Any, inputs: Mapping[str, Any], method: Method | None = None, trace: Trace | None = None
) -> list[Usage]:
    """The account of each sample of a batch, each for itself: padding is not counted, so its mates do not matter.

    Args:
        inputs: of the batch.
        method, trace: what dropped tokens in its prefill, and what that told; None where nothing was dropped.
    """
    info = inspect_model(model)
    kept = [(stage.layer, stage.keep, list(map(len, stage.kept))) for stage in trace.stages] if trace else []
    found = []
    for sample, (visual, text, instruction) in enumerate(_counted(info, inputs, trace)):
        stages = tuple(StageTokens(layer, keep, counts[sample]) for layer, keep, counts in kept)
        found.append(_account(info.sizes, method, visual, text, max(1, instruction), stages))
    return found


def batch_prompts(model: Any, inputs: Mapping[str, Any]) -> list[Prompt]:
    """What each sample of a batch brings, told by its ids: nothing has to run. Each sample needs a picture."""
    return [
        Prompt(visual, text, instruction_tokens=instruction)
        for visual, text, instruction in _counted(inspect_model(model), inputs)
    ]


def _counted(info: ModelInfo, inputs: Mapping[str, Any], trace: Trace | None = None) -> list[tuple[int, int, int]]:
    """Of each sample of a batch, without padding: visual tokens, all others, and those of them behind the pictures."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    valid = torch.ones_like(ids) if mask is None else mask
    marked = torch.isin(ids, torch.tensor(info.visual_ids, device=ids.device))
    visual = trace.visual_columns if trace else [row.nonzero()[:, 0] for row in marked]
    found = []
    for row, columns in zip(valid, visual, strict=True):
        text = int(row.sum()) - len(columns)
        found.append((len(columns), text, int(row[int(columns[-1]) + 1 :].sum()) if len(columns) else text))
    return found


def _account(
    shape: DecoderShape | None,
    method: Method | None,
    visual: int,
    text: int,
    instruction: int,
    stages: tuple[StageTokens, ...],
) -> Usage:
    """The account of one sample: `visual` tokens, `text` tokens, of which the `instruction` is behind the pictures."""
    unknown = Usage(visual, text, stages, math.nan, math.nan)
    if shape is None:
        return unknown
    tokens = unknown.by_layer(shape.layers)
    lengths = [text + count for count in tokens]
    flops = prefill_flops(shape, lengths, visual=tokens)
    for stage, before in zip(stages, unknown.tokens_by_stage, strict=False):
        if method is not None and stage.tokens < before:
            drop = DropCounts(stage.layer, text + before, before, stage.tokens, instruction=instruction)
            flops += method.ranking_flops(shape, drop)
    return replace(unknown, flops=flops, kv_bytes=kv_bytes(shape, lengths))


def known(number: float) -> float | None:
    """The number, or None where it is not known: JSON has no NaN."""
    return None if math.isnan(number) else number
