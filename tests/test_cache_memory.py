"""What a cache remembers, and what it refuses to go on with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pyramiddrop import FastV, PyramidDrop
from pyramiddrop.hf.memory import Slots
from tiny import make_batch, tiny_model

LAYERS = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}


def slots(columns: list[list[int]], length: int, valid: list[list[bool]] | None = None) -> Slots:
    return Slots(torch.tensor(columns), None if valid is None else torch.tensor(valid), length)


def test_later_slots_hold_later_columns() -> None:
    grown = slots([[0, 3, 4]], 5, [[False, True, True]]).until(7)
    assert grown.columns.tolist() == [[0, 3, 4, 5, 6]]
    assert grown.valid is not None
    assert grown.valid.tolist() == [[False, True, True, True, True]]


def test_a_further_prefill_adds_its_rows_behind_what_was_decoded() -> None:
    grown = slots([[0, 2]], 4).extended(torch.tensor([[1, 2]]), None, past=5, length=3)
    assert grown.columns.tolist() == [[0, 2, 4, 6, 7]]
    assert grown.length == 8


def test_a_crop_takes_the_text_behind_the_image_and_nothing_else() -> None:
    held = slots([[0, 2, 5, 6]], 7)
    assert held.until(5).columns.tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="cropped by 3 tokens, into visual tokens"):
        held.until(4)


def prompt(batch: int = 1) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = tiny_model()
    return model, make_batch(model, [[3, "image", 6]] * batch)


def test_another_method_cannot_continue_a_pruned_cache() -> None:
    model, inputs = prompt()
    cache = DynamicCache(config=model.config.text_config)
    token = torch.tensor([[7]])
    with torch.no_grad():
        with PyramidDrop(**LAYERS)(model):
            model(**inputs, past_key_values=cache)
        other = copy.deepcopy(cache)
        with FastV(layer=2, keep=0.5)(model), pytest.raises(ValueError, match=r"pruned before layers \[2, 4, 6\]"):
            model(input_ids=token, past_key_values=cache)
        with PyramidDrop(**LAYERS, positions="compact")(model), pytest.raises(ValueError, match="positions='original'"):
            model(input_ids=token, past_key_values=other)


def test_another_batch_cannot_continue_a_pruned_cache() -> None:
    model, inputs = prompt()
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), PyramidDrop(**LAYERS)(model):
        model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="batch of 1; this call has a batch of 2"):
            model(input_ids=torch.tensor([[7], [8]]), past_key_values=cache)
