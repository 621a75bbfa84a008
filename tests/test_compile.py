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
from tiny import make_batch, tiny_model


def decode(model: PreTrainedModel, inputs: dict[str, Tensor], step: Callable[..., Any], steps: int = 5) -> Tensor:
    """Greedy tokens (B, steps) on a static cache; the prompt runs as it is, each later forward through `step`."""
    cache = StaticCache(config=model.config.text_config, max_cache_len=inputs["input_ids"].shape[1] + steps)
    mask, tokens = inputs["attention_mask"], []
    with torch.no_grad():
        output = model(**inputs, past_key_values=cache)
        for _ in range(steps):
            tokens.append(output.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            positions = (mask.cumsum(1) - 1)[:, -1:].contiguous()
            prepared = model.prepare_inputs_for_generation(
                tokens[-1], past_key_values=cache, attention_mask=mask, position_ids=positions
            )
            output = step(**prepared)
    return torch.cat(tokens, 1)


def compiled_graphs(model: PreTrainedModel, inputs: dict[str, Tensor], method: Method | None) -> tuple[Tensor, int]:
    """The tokens by compiled decoding, and how many graphs that took. `fullgraph` raises where a graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    with method(model) if method else nullcontext():
        tokens = decode(model, inputs, torch.compile(model, backend="eager", fullgraph=True))
    return tokens, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_decoding_compiles_as_vanilla_does(positions: str) -> None:
    model = tiny_model("llava-gqa", "sdpa")
    inputs = make_batch(model, [[3, "image", 6], [2, "image", 2, "image", 5]])
    method = PyramidDrop(positions=positions)
    with method(model):
        wanted = decode(model, inputs, model)
    tokens, graphs = compiled_graphs(model, inputs, method)
    assert tokens.tolist() == wanted.tolist()
    assert graphs == compiled_graphs(model, inputs, None)[1]
