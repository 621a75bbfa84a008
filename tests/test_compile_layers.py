"""Prefill with each decoder layer compiled: no graph more than vanilla has, whatever the size of the image."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from pyramiddrop import FastV, Method, PyramidDrop
from pyramiddrop.speed.subject import shape_subject

CPU = torch.device("cpu")
VISUAL_TOKENS = (24, 36, 49)


def prefills(method: Method | None, compiled: bool, use_cache: bool) -> tuple[list[Tensor], int]:
    """The hidden states of prompts with ever more visual tokens, and how many graphs they took."""
    torch._dynamo.reset()
    counters.clear()
    model = shape_subject("tiny", CPU, depth=4, visual=4, text=8).model.model
    for layer in model.layers if compiled else ():
        layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
    found = []
    for tokens in VISUAL_TOKENS:
        sample = shape_subject("tiny", CPU, depth=4, visual=tokens, text=8)
        with torch.no_grad(), method(model, visual_mask=sample.visual) if method else nullcontext():
            found.append(model(**sample.inputs, use_cache=use_cache).last_hidden_state)
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("method", [PyramidDrop(), FastV()])
def test_compiled_layers_have_no_more_graphs_than_vanilla(method: Method, use_cache: bool) -> None:
    wanted, _ = prefills(method, compiled=False, use_cache=use_cache)
    found, graphs = prefills(method, compiled=True, use_cache=use_cache)
    for expected, hidden in zip(wanted, found, strict=True):
        torch.testing.assert_close(hidden, expected)
    assert 0 < graphs <= prefills(None, compiled=True, use_cache=use_cache)[1]
