"""The usage of one prefill: visual tokens after each drop, FLOPs, and bytes of KV cache."""

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
    """The number of visual tokens from `layer` on."""

    layer: int
    keep: float
    tokens: int


@dataclass(frozen=True)
class Usage:
    """The usage of one prefill of one prompt.

    Attributes:
        text_tokens: number of all tokens that are not visual.
        stages: the drops; empty without a method.
        flops: FLOPs of the decoder's layers, by the cost model; 2 for a multiply-add.
        kv_bytes: bytes of the KV cache after the prefill.

    `flops` and `kv_bytes` are NaN for a text model that the cost model does not know.
    """

    visual_tokens: int
    text_tokens: int
    stages: tuple[StageTokens, ...]
    flops: float = math.nan
    kv_bytes: float = math.nan

    @property
    def tokens_by_stage(self) -> list[int]:
        """The number of visual tokens at the start, then after each drop."""
        return [self.visual_tokens, *(stage.tokens for stage in self.stages)]

    def by_layer(self, layers: int) -> list[int]:
        """The number of visual tokens in each of the model's `layers` layers."""
        counts = self.tokens_by_stage
        return [counts[sum(stage.layer <= layer for stage in self.stages)] for layer in range(layers)]


def usage(trace: Trace) -> Usage:
    """The usage of the last prefill (of a single sample) in `trace`."""
    stages = tuple(StageTokens(stage.layer, stage.keep, len(stage.kept[0])) for stage in trace.stages)
    used = Usage(trace.visual_tokens[0], trace.length - trace.visual_tokens[0], stages)
    if not trace.has_sizes:
        return used
    cost = trace.cost()
    return replace(used, flops=cost.flops, kv_bytes=cost.kv_bytes)


def vanilla_usage(model: Any, inputs: Mapping[str, Any]) -> Usage:
    """The usage of a prefill of `inputs` (a single sample) without dropping."""
    return batch_usage(model, inputs)[0]


def batch_usage(
    model: Any, inputs: Mapping[str, Any], method: Method | None = None, trace: Trace | None = None
) -> list[Usage]:
    """The usage of each sample of a batch, without padding, so that it does not depend on the other samples.

    `method` and `trace` are those of the batch's prefill; None without dropping.
    """
    info = inspect_model(model)
    kept = [(stage.layer, stage.keep, list(map(len, stage.kept))) for stage in trace.stages] if trace else []
    found = []
    for sample, (visual, text, instruction) in enumerate(_counted(info, inputs, trace)):
        stages = tuple(StageTokens(layer, keep, counts[sample]) for layer, keep, counts in kept)
        used = Usage(visual, text, stages)
        found.append(_with_costs(used, info.sizes, method, max(1, instruction)) if info.sizes else used)
    return found


def batch_prompts(model: Any, inputs: Mapping[str, Any]) -> list[Prompt]:
    """The token counts of each sample of a batch, from its ids, without running it. Each sample needs a picture."""
    return [
        Prompt(visual, text, instruction_tokens=instruction)
        for visual, text, instruction in _counted(inspect_model(model), inputs)
    ]


def _counted(info: ModelInfo, inputs: Mapping[str, Any], trace: Trace | None = None) -> list[tuple[int, int, int]]:
    """For each sample, without padding: numbers of visual tokens, of all others, and of those after the pictures."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    valid = torch.ones_like(ids) if mask is None else mask
    marked = torch.isin(ids, torch.tensor(info.visual_ids, device=ids.device))
    visual = trace.visual_columns if trace else [row.nonzero()[:, 0] for row in marked]
    found = []
    for row, columns in zip(valid, visual, strict=True):
        text = int(row.sum()) - len(columns)
        found.append((len(columns), text, int(row[int(columns[-1]) + 1 :].sum()) if len(columns) else text))
    return found


def _with_costs(used: Usage, shape: DecoderShape, method: Method | None, instruction: int) -> Usage:
    """The usage of one sample, of whose text tokens `instruction` follow the pictures, with FLOPs and bytes."""
    tokens, text = used.by_layer(shape.layers), used.text_tokens
    lengths = [text + count for count in tokens]
    flops = prefill_flops(shape, lengths, visual=tokens)
    for stage, before in zip(used.stages, used.tokens_by_stage, strict=False):
        if method is not None and stage.tokens < before:
            drop = DropCounts(stage.layer, text + before, before, stage.tokens, instruction=instruction)
            flops += method.ranking_flops(shape, drop)
    return replace(used, flops=flops, kv_bytes=kv_bytes(shape, lengths))


def none_if_nan(number: float) -> float | None:
    """The number, or None instead of NaN, which JSON does not have."""
    return None if math.isnan(number) else number
