"""Where a model lets tokens be dropped, on parts that are made by hand, and what is refused before a hook is put on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pyramiddrop import FastV, PyramidDrop, RandomDrop, UnsupportedModelError
from pyramiddrop.hf import drop_layers
from pyramiddrop.hf.masks import FULL, AttentionScope
from pyramiddrop.hf.model_info import ModelInfo, check_attention, check_compact_positions, check_layers, inspect_model
from pyramiddrop.scoring import AttentionScorer, Scorer, UniformScorer, VariationScorer
from tiny import tiny_model

MIXED = [AttentionScope("sliding", 8)] * 3 + [FULL] + [AttentionScope("sliding", 8)] * 3 + [FULL]
HYBRID = [AttentionScope("recurrent")] * 3 + [FULL] + [AttentionScope("recurrent")] * 3 + [FULL]


def info(scopes: Sequence[AttentionScope] = (FULL,) * 8, sources: Sequence[int] = tuple(range(8))) -> ModelInfo:
    """A Llama of eight layers that says to see so far, and to attend to the keys of these layers."""
    return replace(inspect_model(tiny_model()), scopes=tuple(scopes), sources=tuple(sources))


def scorer(attends: bool) -> Scorer:
    return AttentionScorer() if attends else UniformScorer()


def allowed(scopes: Sequence[AttentionScope], rank_layer: str, attends: bool = True, **sources: Any) -> list[int]:
    return list(drop_layers(info(scopes, **sources), rank_layer, scorer(attends)))


# --- Where tokens are best dropped ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("rank_layer", ["next", "last"])
def test_a_plain_model_drops_anywhere_but_before_its_first_layer(rank_layer: str, attends: bool) -> None:
    assert allowed([FULL] * 8, rank_layer, attends) == [1, 2, 3, 4, 5, 6, 7]


def test_layers_that_see_everything_rank() -> None:
    assert allowed(MIXED, "next") == [3, 7]
    assert allowed(MIXED, "last") == [4]  # the layer behind layer 7 is none


def test_where_all_layers_see_a_window_all_may_rank() -> None:
    assert allowed([AttentionScope("sliding", 8)] * 8, "next") == [1, 2, 3, 4, 5, 6, 7]


def test_recurrent_layers_cannot_rank_and_nothing_is_dropped_before_the_first_layer_of_attention_has_run() -> None:
    assert allowed(HYBRID, "next") == [7]
    assert allowed(HYBRID, "last") == [4]
    assert allowed([AttentionScope("recurrent"), FULL] * 4, "next") == [3, 5, 7]
    assert allowed([AttentionScope("recurrent"), FULL] * 4, "last") == [2, 4, 6]


def test_a_method_that_needs_no_attention_may_drop_before_any_layer_behind_the_first_of_attention() -> None:
    assert allowed(MIXED, "next", attends=False) == [1, 2, 3, 4, 5, 6, 7]
    assert allowed(HYBRID, "next", attends=False) == [4, 5, 6, 7]


def test_nothing_is_dropped_before_layers_that_share_keys() -> None:
    assert allowed([FULL] * 8, "next", sources=[0, 1, 2, 3, 4, 4, 4, 4]) == [1, 2, 3, 4]


# --- What is refused ------------------------------------------------------------------------------------------------


def refused(
    model: ModelInfo, layers: tuple[int, ...], words: str, rank_layer: str = "next", attends: bool = True
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        check_layers(model, layers, rank_layer, scorer(attends))


def test_a_layer_without_attention_cannot_rank() -> None:
    refused(info(HYBRID), (7, 5), "before layer 5: layer 5, which would rank them, has no attention")
    refused(info(HYBRID), (5,), "before layer 5: layer 4, which would rank them, has no attention", "last")
    check_layers(info(HYBRID), (7,), "next", scorer(True))
    check_layers(info(HYBRID), (5,), "next", scorer(False))


def test_nothing_is_dropped_before_the_model_has_counted_its_cache() -> None:
    words = "before layer 2: the model reads the length of its cache from a layer behind it. Allowed are layers"
    refused(info(HYBRID), (2,), words, attends=False)
    refused(info(HYBRID), (3,), "before layer 3: the model reads the length of its cache")


def test_a_score_that_compares_needs_a_layer_before_the_one_that_ranks() -> None:
    assert drop_layers(info(), "last", VariationScorer()) == (2, 3, 4, 5, 6, 7)
    with pytest.raises(UnsupportedModelError, match="before layer 1: its score compares layer 0 with the one before"):
        check_layers(info(), (1,), "last", VariationScorer())


def test_layers_that_share_keys_are_refused() -> None:
    refused(info(sources=[0, 1, 2, 3, 4, 4, 4, 4]), (2, 6), "before layer 6: it reuses the keys of an earlier layer")


def test_windowed_layers_are_allowed_where_the_user_names_them() -> None:
    check_layers(info(MIXED), (1, 2, 3, 4), "next", scorer(True))


def test_flash_attention_counts_windows_in_what_is_left() -> None:
    flash = info(MIXED)
    flash.text.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2 counts the window of layer 4"):
        check_attention(flash, 3)
    check_attention(flash, 7)  # no window behind the drop
    check_attention(info(MIXED), 3)
    check_attention(replace(flash, scopes=(FULL,) * 8), 3)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic"}, "for 'dynamic' RoPE"),
        ({"rope_type": "longrope"}, "for 'longrope' RoPE"),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, r"positions of several axes \(M-RoPE\)"),
        ({"full_attention": {}, "sliding_attention": {}}, "whose layers do not share one rotary embedding"),
    ],
)
def test_compact_positions_are_refused_where_they_are_undefined(rope: dict[str, Any], words: str) -> None:
    model = info()
    check_compact_positions(model)
    model.text.config.rope_parameters = rope
    with pytest.raises(UnsupportedModelError, match=words):
        check_compact_positions(model)


def test_compact_positions_are_refused_without_a_rotary_embedding() -> None:
    model = info()
    del model.text.rotary_emb
    with pytest.raises(UnsupportedModelError, match='positions="compact" is undefined for LlamaModel'):
        check_compact_positions(model)


# --- The same on models ---------------------------------------------------------------------------------------------


def zoo_model(name: str) -> Any:
    pytest.importorskip("transformers", minversion="5.23")
    from zoo import MEMBERS

    return MEMBERS[name].build(0)


def test_by_default_stages_end_at_layers_that_see_everything() -> None:
    model = zoo_model("gemma3")
    assert [scope.kind for scope in inspect_model(model).scopes] == (["sliding"] * 3 + ["full"]) * 2
    assert dropped_before(model, PyramidDrop(stages=3)) == [3, 7]
    assert dropped_before(model, RandomDrop(stages=3)) == [2, 5], "which needs no layer to rank"


def dropped_before(model: Any, method: Any) -> list[int]:
    """The layers before which a forward has dropped tokens."""
    from zoo import MEMBERS, make_batch

    inputs = make_batch(MEMBERS["gemma3"], model, [[3, "image", 5]])
    with torch.no_grad(), method(model) as trace:
        model(**inputs)
    return [stage.layer for stage in trace.stages]


def test_more_stages_than_such_layers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"4 stages need 3 layers to drop before; this model allows \[3, 7\]"):
        PyramidDrop()(zoo_model("gemma3")).__enter__()


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("qwen3_5", PyramidDrop(layers=[5], keep=[0.5]), "layer 5, which would rank them, has no attention"),
        ("qwen3_5", FastV(), "layer 1, which would rank them, has no attention"),
        ("qwen3_5", RandomDrop(layers=[3], keep=[0.5]), "the model reads the length of its cache"),
        ("gemma4-edge", PyramidDrop(layers=[11], keep=[0.5]), "it reuses the keys of an earlier layer"),
        ("qwen2_vl", PyramidDrop(positions="compact"), "M-RoPE"),
        ("gemma3", PyramidDrop(layers=[3], keep=[0.5], positions="compact"), "do not share one rotary embedding"),
    ],
)
def test_refused_by_name_and_never_half_patched(name: str, method: Any, words: str) -> None:
    model = zoo_model(name)
    with pytest.raises(UnsupportedModelError, match=words), method(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "generate" not in vars(model)
