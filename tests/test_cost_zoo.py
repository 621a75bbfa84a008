"""The cost model on the zoo: FLOPs against PyTorch's counter, bytes against the real cache, with and without drops."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramiddrop import PyramidDrop
from pyramiddrop.cost import head_flops, kv_bytes, layer_kv_bytes, prefill_flops, step_flops
from pyramiddrop.families import FAMILIES
from pyramiddrop.hf.model_info import ModelInfo, drop_layers, inspect_model
from pyramiddrop.hf.versions import cache_argument
from pyramiddrop.scoring import AttentionScorer, UniformScorer
from pyramiddrop.speed.memory import cache_bytes
from test_cost import FUSED_ON_CPU
from zoo import MEMBERS, make_batch

ROWS = 130  # more than any window, and no multiple of a chunk
#: One for each kind of layer; the others are slow.
FAST = ("ernie4_5_vl_moe", "fuyu", "gemma3n", "gemma4-edge", "kimi_k25", "lfm2_vl", "llama4", "qwen3_5", "step3p7")
#: Members whose tower stops PyTorch's counter with an assertion of its own.
UNCOUNTABLE = {"idefics2", "idefics2-sliding"}
#: A member with prompts longer than this model may drop anything from.
TOO_LONG = {"llama4-long"}
SUPPORTED = [name for name, member in MEMBERS.items() if not FAMILIES[name.split("-")[0]].refused]


def marked(names: list[str]) -> list[Any]:
    """As parameters, of which all but a few are slow."""
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@cache
def model_of(name: str) -> PreTrainedModel:
    """The member's model, whose experts run one by one: a grouped product is not counted on the CPU."""
    model = MEMBERS[name].build(0)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._experts_implementation = "eager"
    return model


def counted(model: Any, inputs: dict[str, Any], cache: Cache | None = None) -> tuple[int, Cache]:
    """FLOPs of a forward, and the cache that it leaves."""
    cache = cache or DynamicCache(config=model.config)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(**inputs, use_cache=True, **cache_argument(cache))
    return int(counter.get_total_flops()), cache


def held_bytes(cache: Cache) -> list[int]:
    """Of each layer: keys and values, and states."""
    return [sum(tensor.nbytes for tensor in _tensors(layer)) for layer in cache.layers]


def _tensors(layer: Any) -> list[Tensor]:
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    tensors = [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return [tensor for tensor in tensors if tensor is not None]


def uncounted(info: ModelInfo) -> int:
    """FLOPs of a decode step that the counter misses: the products with the delta rule's state, made elementwise."""
    return sum(mixer.step for mixer in info.shape.mixers)


def text_inputs(rows: int) -> dict[str, Tensor]:
    """Of the text model alone: ids, of which some models make more than their embeddings."""
    return {"input_ids": torch.arange(2, 2 + rows)[None] % 140 + 2}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", marked(SUPPORTED))
def test_a_text_model_is_what_the_counter_and_its_cache_say(name: str) -> None:
    info = inspect_model(model_of(name))
    shape = info.shape
    lengths = [ROWS] * shape.layers
    prefill, cache = counted(info.text, text_inputs(ROWS))
    assert prefill_flops(shape, lengths) == pytest.approx(prefill, rel=0.001)
    held = held_bytes(cache)
    assert [layer_kv_bytes(shape, ROWS, layer) for layer in range(len(held))] == held
    assert kv_bytes(shape, lengths) == sum(held)  # layers that reuse keys have no cache
    if not any(mixer.window for mixer in shape.mixers):  # whose keys are views of all rows until the next step
        assert cache_bytes(cache) == sum(held)
    step, _ = counted(info.text, text_inputs(1), cache)
    assert step_flops(shape, lengths) - head_flops(shape) == pytest.approx(step + uncounted(info), rel=0.01)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", marked([name for name in SUPPORTED if name not in UNCOUNTABLE | TOO_LONG]))
def test_what_dropping_saves_is_what_the_counter_and_the_cache_say(name: str) -> None:
    model, member = model_of(name), MEMBERS[name]
    inputs = make_batch(member, model, [[20, "image", 30]])
    vanilla, _ = counted(model, inputs)
    with PyramidDrop(lam=0.4, stages=2)(model) as trace:
        counted(model, inputs)  # the first prefill finds out how each layer may be asked
        pruned, cache = counted(model, inputs)
    cost = trace.cost()
    assert cost.vanilla_flops - cost.flops == pytest.approx(vanilla - pruned, abs=0.001 * cost.vanilla_flops)
    assert cost.kv_bytes == sum(held_bytes(cache))


@pytest.mark.parametrize("name", marked(SUPPORTED))
def test_sizes_tell_before_which_layers_the_model_drops(name: str) -> None:
    info = inspect_model(model_of(name))
    for rank_layer in ("next", "last"):
        for scorer in (AttentionScorer(), UniformScorer()):
            assert info.shape.drop_layers(rank_layer, scorer.needs_attention) == drop_layers(info, rank_layer, scorer)
