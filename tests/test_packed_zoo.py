"""Packed rows of families whose positions have several axes: the text's stand before them, as Transformers asks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_cpu import flash_on_cpu
from masked_oracle import text_model
from pyramiddrop import PyramidDrop
from zoo import MEMBERS, Answer
from zoo.pieces import Row, collate, make_rows

SPECS: list[list[Any]] = [[5, "image", 7, Answer(3)], [3, "image", 2, "image", 4, Answer(4)], [6, Answer(2)]]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@cache
def model_of(name: str) -> PreTrainedModel:
    return MEMBERS[name].build(0)


def alone(name: str, row: Row, labels: bool) -> dict[str, Tensor]:
    """A document by itself, with the text's positions and the three of the grids: (4, 1, L)."""
    model = model_of(name)
    inputs: dict[str, Tensor] = collate(MEMBERS[name], model, [row], labels=labels)
    del inputs["attention_mask"]
    text = torch.arange(inputs["input_ids"].shape[1])[None, None]
    grids = text.expand(3, -1, -1)
    if "image_grid_thw" in inputs:
        grids, _ = model.model.get_rope_index(
            **{k: v for k, v in inputs.items() if k not in ("labels", "pixel_values")}
        )
    return inputs | {"position_ids": torch.cat([text, grids])}


def joined(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The documents in one row."""
    along = {"input_ids": 1, "labels": 1, "mm_token_type_ids": 1, "position_ids": 2}
    names = {name for one in each for name in one}
    return {name: torch.cat([one[name] for one in each if name in one], along.get(name, 0)) for name in names}


@pytest.mark.fast_cases(10)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "prompts"])
@pytest.mark.parametrize("way", ["sdpa", "positions", "bounds", "bounds alone"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("per_image", [False, True])
@torch.no_grad()
def test_each_document_is_as_alone(name: str, way: str, labels: bool, per_image: bool) -> None:
    model = model_of(name)
    method = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125], per_image=per_image)
    each = [alone(name, row, labels) for row in make_rows(MEMBERS[name], model, SPECS)]
    lengths = torch.tensor([one["input_ids"].shape[1] for one in each])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    inputs: dict[str, Any] = joined(each)
    if way.startswith("bounds"):
        longest = int(lengths.max())
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    if way == "bounds alone":
        inputs["position_ids"] = inputs["position_ids"][1:]
    with nullcontext() if way == "sdpa" else flash_on_cpu(text_model(model)), method(model) as trace:
        got = model(**inputs, use_cache=False).logits
        kept = [stage.kept[0].tolist() for stage in trace.stages]
        expected, logits = [[], [], []], []
        for one, first in zip(each, bounds.tolist(), strict=False):
            logits.append(model(**one, use_cache=False).logits)
            for columns, stage in zip(expected, trace.stages, strict=True):
                columns += [column + first for column in stage.kept[0].tolist()]
    assert kept == expected
    torch.testing.assert_close(got, torch.cat(logits, 1), **CLOSE)
