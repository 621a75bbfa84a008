"""Features that come in behind a drop: the rows that are left get theirs, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyramiddrop.hf.layer_inputs import DeepStack
from pyramiddrop.hf.rows import Selection

VISUAL = torch.tensor([[False, True, True, True, False], [True, False, True, False, False]])


def features(layer: int) -> Tensor:
    """Five rows of width 1, one for each visual token of the batch: 10, 11, ... for layer 1, 20, 21, ... for 2."""
    return torch.arange(5.0)[:, None] + 10 * layer


def between(first: int) -> tuple[DeepStack | None, dict[str, Any]]:
    """Qwen3-VL: entry i is added behind layer i, which is before layer i + 1."""
    given = {"deepstack_visual_embeds": [features(1), features(2), features(3)], "visual_pos_masks": VISUAL, "other": 7}
    return DeepStack.taken(given, first)


def before(first: int) -> tuple[DeepStack | None, dict[str, Any]]:
    """Granite: a dict of layers, and a mask with a dimension more."""
    given = {"deepstack_features": {1: features(1), 2: features(2), 3: features(3)}, "vision_mask": VISUAL[..., None]}
    return DeepStack.taken({**given, "other": 7}, first)


def own_layers(kwargs: dict[str, Any]) -> list[int]:
    """Before which layers the model itself still adds."""
    if "deepstack_features" in kwargs:
        return list(kwargs["deepstack_features"])
    return list(range(1, len(kwargs["deepstack_visual_embeds"]) + 1))


@pytest.mark.parametrize("taken", [between, before])
@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_the_model_adds_what_comes_before_the_first_drop(taken: Any, first: int) -> None:
    deepstack, kwargs = taken(first)
    # At the layer of the drop itself, the model's loop has added before the layer's hook gathers rows.
    mine = [layer for layer in (1, 2, 3) if layer <= first]
    assert own_layers(kwargs) == mine
    assert kwargs["other"] == 7
    if len(mine) == 3:
        assert deepstack is None
    else:
        assert sorted(deepstack.features) == [layer for layer in (1, 2, 3) if layer > first]
        for layer, rows in deepstack.features.items():
            assert torch.equal(rows, features(layer))
        assert torch.equal(deepstack.visual, VISUAL)


@pytest.mark.parametrize("taken", [between, before])
def test_the_callers_kwargs_are_left_alone(taken: Any) -> None:
    given = {"deepstack_visual_embeds": [features(1)], "visual_pos_masks": VISUAL}
    DeepStack.taken(given, 0)
    assert len(given["deepstack_visual_embeds"]) == 1


@pytest.mark.parametrize("kwargs", [{}, {"deepstack_visual_embeds": None, "visual_pos_masks": None}, {"x": 1}])
def test_a_call_without_features(kwargs: dict[str, Any]) -> None:
    assert DeepStack.taken(kwargs, 1) == (None, kwargs)


# --- Adding ---------------------------------------------------------------------------------------------------------


def added(layer: int, kept: Selection | None, width: int) -> list[list[float]]:
    deepstack, _ = between(1)
    assert deepstack is not None
    hidden = torch.full((2, width, 1), 100.0)
    result = deepstack.add(layer, hidden, kept)
    assert bool((hidden == 100).all()), "in place"
    return (result - 100)[..., 0].tolist()


def test_without_a_drop_every_visual_token_gets_its_row() -> None:
    assert added(2, None, 5) == [[0, 20, 21, 22, 0], [23, 0, 24, 0, 0]]


def test_after_a_drop_the_rows_that_are_left_get_theirs() -> None:
    kept = Selection(torch.tensor([[0, 1, 3, 4], [0, 1, 3, 4]]), torch.zeros(2, 4), None)  # columns 2 are dropped
    assert added(3, kept, 4) == [[0, 30, 32, 0], [33, 0, 0, 0]]


def test_layers_without_features_get_nothing() -> None:
    assert added(1, None, 5) == added(4, None, 5) == [[0.0] * 5] * 2


def test_features_follow_the_dtype_of_the_hidden_states() -> None:
    deepstack, _ = between(1)
    assert deepstack is not None
    assert deepstack.add(2, torch.zeros(2, 5, 1, dtype=torch.bfloat16), None).dtype == torch.bfloat16
