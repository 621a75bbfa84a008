"""Compiled decoding: one graph without breaks, and no recompilation that the untouched model does not have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache

from pyramiddrop import Method, PyramidDrop
from pyramiddrop.hf.versions import cache_argument
from tiny import make_batch, tiny_model

WIDTH = 64  # of the static cache, for prompts of any length


def decode(model: PreTrainedModel, inputs: dict[str, Tensor], step: Callable[..., Any], steps: int = 4) -> Tensor:
    """Greedy tokens (B, steps) on a static cache; the prompt runs as it is, each later forward through `step`."""
    cache = StaticCache(config=model.config.text_config, max_cache_len=WIDTH)
    mask, tokens = inputs["attention_mask"], []
    with torch.no_grad():
        output = model(**inputs, **cache_argument(cache))
        for _ in range(steps):
            tokens.append(output.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            positions = (mask.cumsum(1) - 1)[:, -1:].contiguous()
            prepared = model.prepare_inputs_for_generation(
                tokens[-1], **cache_argument(cache), attention_mask=mask, position_ids=positions
            )
            output = step(**prepared)
    return torch.cat(tokens, 1)


def compiled_graphs(
    model: PreTrainedModel, prompts: list[dict[str, Tensor]], method: Method | None
) -> tuple[list[list[list[int]]], int]:
    """Tokens by compiled decoding, and how many graphs all prompts took. `fullgraph` raises where a graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    with method(model) if method else nullcontext():
        step = torch.compile(model, backend="eager", fullgraph=True)
        tokens = [decode(model, inputs, step).tolist() for inputs in prompts]
    return tokens, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_decoding_compiles_as_vanilla_does(positions: str) -> None:
    model = tiny_model("llava-gqa", "sdpa")
    specs = ([[3, "image", 6], [2, "image", 2, "image", 5]], [[3, "image", 4], [9]], [[4, "image", 9], [1, "image", 2]])
    prompts = [make_batch(model, spec) for spec in specs]
    method = PyramidDrop(positions=positions)
    with method(model):
        wanted = [decode(model, inputs, model).tolist() for inputs in prompts]
    tokens, graphs = compiled_graphs(model, prompts, method)
    assert tokens == wanted
    assert graphs == compiled_graphs(model, prompts, None)[1], "prompts of other lengths must not recompile"
