"""What a cache remembers, and what it refuses to go on with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig

from pyramiddrop import FastV, PyramidDrop
from pyramiddrop.hf.cache_state import CacheIndex
from pyramiddrop.hf.versions import cache_argument
from tiny import make_batch, tiny_model

LAYERS = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}


def slots(columns: list[list[int]], length: int, valid: list[list[bool]] | None = None) -> CacheIndex:
    return CacheIndex(torch.tensor(columns), None if valid is None else torch.tensor(valid), length)


def test_later_slots_hold_later_columns() -> None:
    grown = slots([[0, 3, 4]], 5, [[False, True, True]]).resized(7)
    assert grown.columns.tolist() == [[0, 3, 4, 5, 6]]
    assert grown.valid is not None
    assert grown.valid.tolist() == [[False, True, True, True, True]]


def test_a_further_prefill_adds_its_rows_behind_what_was_decoded() -> None:
    grown = slots([[0, 2]], 4).extended(torch.tensor([[1, 2]]), None, past=5, length=3)
    assert grown.columns.tolist() == [[0, 2, 4, 6, 7]]
    assert grown.length == 8


def test_a_crop_takes_the_text_behind_the_image_and_nothing_else() -> None:
    held = slots([[0, 2, 5, 6]], 7)
    assert held.resized(5).columns.tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="cropped by 3 tokens, into visual tokens"):
        held.resized(4)
    for length in (5, 3):  # all that is held, and more than that
        with pytest.raises(ValueError, match="into visual tokens"):
            slots([[5, 6]], 7).resized(length)


def prompt(batch: int = 1) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = tiny_model()
    return model, make_batch(model, [[3, "image", 6]] * batch)


def test_another_method_cannot_continue_a_pruned_cache() -> None:
    model, inputs = prompt()
    cache = DynamicCache(config=model.config.text_config)
    token = torch.tensor([[7]])
    with torch.no_grad():
        with PyramidDrop(**LAYERS)(model):
            model(**inputs, **cache_argument(cache))
        other = copy.deepcopy(cache)
        with FastV(layer=2, keep=0.5)(model), pytest.raises(ValueError, match=r"pruned before layers \[2, 4, 6\]"):
            model(input_ids=token, **cache_argument(cache))
        with PyramidDrop(**LAYERS, positions="compact")(model), pytest.raises(ValueError, match="positions='original'"):
            model(input_ids=token, **cache_argument(other))


def test_another_batch_cannot_continue_a_pruned_cache() -> None:
    model, inputs = prompt()
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), PyramidDrop(**LAYERS)(model):
        model(**inputs, **cache_argument(cache))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
        with pytest.raises(ValueError, match="batch of 1; this call has a batch of 2"):
            model(input_ids=torch.tensor([[7], [8]]), **cache_argument(cache))


# --- What a layer's cache hands out ---------------------------------------------------------------------------------


def handed(cache: DynamicCache, index: int, held: CacheIndex, added: int) -> tuple[list[list[int]], list[list[int]]]:
    """The columns that a cache layer really hands out once the last `added` slots are in it, and those told before."""
    told = held.window(cache, index, added)
    assert told.length == held.length
    new = held.columns[:, -added:].float()[:, None, :, None]
    keys, _ = cache.update(new, new, index)
    return keys[:, 0, :, 0].long().tolist(), told.columns.tolist()


def sliding_cache(window: int = 4) -> DynamicCache:
    """Layer 0 sees a window, layer 1 everything."""
    kinds = ["sliding_attention", "full_attention"]
    config = MistralConfig(num_hidden_layers=2, sliding_window=window)
    config.layer_types = kinds
    return DynamicCache(config=config)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kept", [[0, 2, 3], [0, 2, 5, 8], [0, 1, 4, 6, 7, 9]])
def test_a_sliding_layer_hands_out_its_last_slots(layer: int, kept: list[int]) -> None:
    cache, held = sliding_cache(), slots([kept, kept], 10)
    real, told = handed(cache, layer, held, len(kept))
    assert real == told == [kept, kept], "a prefill sees all that it computes"
    for length, added in ((11, 1), (12, 1), (15, 3), (16, 1)):
        held = held.resized(length)
        real, told = handed(cache, layer, held, added)
        assert real == told
    assert len(told[0]) == (4 if layer == 0 else len(kept) + 6)


def test_the_filler_of_a_sliding_layer_is_cut_alike() -> None:
    cache = sliding_cache()
    held = slots([[1, 2, 3, 5, 6, 7]], 8, [[False, False, False, False, True, True]])
    handed(cache, 0, held, 6)
    told = held.resized(9).window(cache, 0, 1)
    assert told.columns.tolist() == [[5, 6, 7, 8]]
    assert told.valid is not None
    assert told.valid.tolist() == [[False, True, True, True]]


def test_without_a_cache_all_slots_are_handed_out() -> None:
    held = slots([[0, 3, 4]], 5)
    assert held.window(None, 0, 3) is held


def test_of_an_earlier_layers_slots_those_are_shown_that_this_stage_has_kept() -> None:
    """Layers that share keys: the source holds columns 0, 2, 3, 5 and 6; this stage has kept 0, 3 and 6."""
    shown = slots([[0, 2, 3, 5, 6]], 7).restricted(torch.tensor([[0, 3, 6]]), None)
    assert shown.columns.tolist() == [[0, 2, 3, 5, 6]]
    assert shown.alive.tolist() == [[True, False, True, False, True]]
    assert shown.length == 7


def test_filler_on_either_side_shows_nothing() -> None:
    source = slots([[4, 0, 3, 6], [0, 2, 3, 6]], 7, [[False, True, True, True], [True] * 4])
    kept, valid = torch.tensor([[4, 3, 6], [2, 0, 6]]), torch.tensor([[True] * 3, [False, True, True]])
    # Sample 0: slot 0 is filler of the source. Sample 1: column 2 is filler of the stage.
    assert source.restricted(kept, valid).alive.tolist() == [[False, False, True, True], [True, False, False, True]]
