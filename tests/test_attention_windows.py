"""How far layers see, by columns small enough to count by hand, and read from configurations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
)

from pyramiddrop.hf.masks import FULL, AttentionScope, UnknownLayerTypeError, scopes_of


def columns(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def reached(scope: AttentionScope, queries: list[int], keys: list[int], start: int = 0) -> list[list[int]]:
    near = scope.reaches(columns(queries), columns(keys), torch.tensor([start]))
    assert near.shape == (1, 1, len(queries), len(keys))
    return near[0, 0].int().tolist()


def test_a_window_holds_the_last_columns_whatever_was_dropped_between() -> None:
    # A window of 3 behind column 7 holds 5, 6 and 7: of the keys that are left, 5 and 7.
    assert reached(AttentionScope("sliding", 3), [7], [0, 4, 5, 7]) == [[0, 0, 1, 1]]
    assert reached(AttentionScope("sliding", 3), [4, 8], [1, 2, 4, 6, 8]) == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_a_chunk_holds_its_own_columns() -> None:
    assert reached(AttentionScope("chunked", 4), [5, 8], [0, 3, 4, 7, 8]) == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_chunks_are_counted_from_the_first_token_behind_left_padding() -> None:
    # Two columns of padding: the chunks are 2..5 and 6..9.
    assert reached(AttentionScope("chunked", 4), [5, 6], [2, 5, 6, 9], start=2) == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_each_sample_has_its_own_start_of_chunks() -> None:
    near = AttentionScope("chunked", 2).reaches(columns([3], [3]), columns([1, 2, 3], [1, 2, 3]), torch.tensor([0, 1]))
    assert near[:, 0, 0].tolist() == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("scope", [FULL, AttentionScope("recurrent")])
def test_other_kinds_reach_everything(scope: AttentionScope) -> None:
    assert not scope.windowed
    assert reached(scope, [0, 9], [0, 5, 9]) == [[1, 1, 1], [1, 1, 1]]


def test_windows_and_chunks_are_windowed() -> None:
    assert AttentionScope("sliding", 3).windowed
    assert AttentionScope("chunked", 3).windowed


# --- Read from a text model -----------------------------------------------------------------------------------------


def text(model_class: Any, config_class: Any, **changes: Any) -> PreTrainedModel:
    """A text model of six layers without weights."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config_class(**sizes, **heads, **changes))
    return model


def named(*types: str, **settings: Any) -> Any:
    """A text model that has nothing but layers of these types."""
    return SimpleNamespace(config=SimpleNamespace(layer_types=list(types), **settings), layers=[None] * len(types))


def test_a_model_without_layer_types_sees_everything() -> None:
    assert scopes_of(text(LlamaModel, LlamaConfig)) == (FULL,) * 6


def test_llama_never_slides_whatever_its_configuration_says() -> None:
    model = text(LlamaModel, LlamaConfig)
    model.config.sliding_window = 4
    assert scopes_of(model) == (FULL,) * 6


def test_mistral_has_no_layer_types_and_slides_everywhere() -> None:
    assert scopes_of(text(MistralModel, MistralConfig, sliding_window=4)) == (AttentionScope("sliding", 4),) * 6
    assert scopes_of(text(MistralModel, MistralConfig, sliding_window=None)) == (FULL,) * 6


def test_layer_types_of_gemma_3() -> None:
    model = text(Gemma3TextModel, Gemma3TextConfig, sliding_window=8, sliding_window_pattern=3)
    assert [scope.kind for scope in scopes_of(model)] == [
        {"full_attention": "full", "sliding_attention": "sliding"}[each] for each in model.config.layer_types
    ]
    assert {scope.size for scope in scopes_of(model) if scope.windowed} == {8}


def test_every_layer_type_that_is_known() -> None:
    types = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv")
    assert scopes_of(named(*types, sliding_window=4, attention_chunk_size=6)) == (
        FULL,
        AttentionScope("sliding", 4),
        AttentionScope("chunked", 6),
        AttentionScope("recurrent"),
        AttentionScope("recurrent"),
    )


def test_a_window_without_a_size_is_none() -> None:
    assert scopes_of(named("sliding_attention", "chunked_attention", sliding_window=None)) == (FULL, FULL)


def test_unknown_types_are_named() -> None:
    with pytest.raises(UnknownLayerTypeError, match="layers of type 'mamba', 'sparse'"):
        scopes_of(named("sparse", "full_attention", "mamba", "sparse"))
