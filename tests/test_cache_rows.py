"""A pruned cache whose rows were put in another order, picked or repeated, by Transformers' own methods."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from pyramiddrop import Downsample, Method, PyramidDrop, UniformDrop, VisionDrop
from pyramiddrop.hf.cache_state import CacheState
from pyramiddrop.hf.versions import CACHE_NAMES, cache_of
from tiny import make_batch, tiny_model

LAYERS = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}
SPECS: list[list[Any]] = [[5, "image", 7], [3, "image", 2, "image", 4], [30]]
METHODS: dict[str, Method] = {
    "original": PyramidDrop(**LAYERS),
    "compact": PyramidDrop(**LAYERS, positions="compact"),
    "uniform": UniformDrop(**LAYERS),
    "vision": VisionDrop(keep=0.25),
    "vision compact": VisionDrop(keep=0.25, positions="compact"),
    "downsample": Downsample(keep=0.25),
    "composed": VisionDrop(keep=0.5) | PyramidDrop(layers=[2, 4], keep=[0.5, 0.25]),
}


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llava-gqa")


def cache_in(output: Any) -> Any:
    return next(output[name] for name in CACHE_NAMES if name in output)


def make_cache(kind: str, model: PreTrainedModel) -> Any:
    config = model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=80) if kind == "static" else DynamicCache(config=config)


def step(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    return logits


def longer(mask: Tensor, count: int = 1) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


def by_layer(name: str) -> Callable[[Any, Any], None]:
    def change(cache: Any, argument: Any) -> None:
        for layer in cache.layers:
            getattr(layer, name)(argument)

    return change


CHANGES: dict[str, tuple[Callable[[Any, Any], None], Any, list[int]]] = {
    "reorder": (lambda cache, rows: cache.reorder_cache(rows), torch.tensor([2, 0, 1]), [2, 0, 1]),
    "reorder to fewer": (lambda cache, rows: cache.reorder_cache(rows), torch.tensor([1]), [1]),
    "reorder twice": (
        lambda cache, rows: (cache.reorder_cache(rows), cache.reorder_cache(rows)),
        torch.tensor([2, 0, 1]),
        [1, 2, 0],
    ),
    "pick": (lambda cache, rows: cache.batch_select_indices(rows), torch.tensor([2, 1]), [2, 1]),
    "pick by a mask": (
        lambda cache, rows: cache.batch_select_indices(rows),
        torch.tensor([False, True, True]),
        [1, 2],
    ),
    "repeat": (lambda cache, count: cache.batch_repeat_interleave(count), 2, [0, 0, 1, 1, 2, 2]),
    "layers reorder": (by_layer("reorder_cache"), torch.tensor([1, 0, 2]), [1, 0, 2]),
    "layers pick": (by_layer("batch_select_indices"), torch.tensor([1]), [1]),
}


@pytest.mark.fast_cases(10)
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_remembered_follows_the_rows(model: PreTrainedModel, name: str, change: str) -> None:
    make, argument, rows = CHANGES[change]
    inputs = make_batch(model, SPECS if name != "downsample" else [*SPECS[:2], [3, "image", 4]])
    ids = torch.tensor([[11, 12], [13, 14], [15, 16]])
    with METHODS[name](model):
        cache = cache_in(model(**inputs, use_cache=True))
        mask = longer(inputs["attention_mask"], 2)
        wanted = step(model, copy.deepcopy(cache), ids, mask)
        make(cache, argument)
        assert torch.allclose(step(model, cache, ids[rows], mask[rows]), wanted[rows], atol=1e-5)


@pytest.mark.parametrize("name", ["original", "compact"])
def test_a_static_cache_is_followed(model: PreTrainedModel, name: str) -> None:
    inputs, ids = make_batch(model, SPECS), torch.tensor([[11], [12], [13]])
    mask = longer(inputs["attention_mask"])
    with METHODS[name](model):
        cache = make_cache("static", model)
        model(**inputs, past_key_values=cache)
        wanted = step(model, copy.deepcopy(cache), ids, mask)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert torch.equal(step(model, cache, ids[[2, 0, 1]], mask[[2, 0, 1]]), wanted[[2, 0, 1]])


def pickled(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "copy": copy.copy,
    "another cache on the same layers": lambda cache: Cache(layers=cache.layers),
    "copied layers": lambda cache: Cache(layers=[copy.copy(layer) for layer in cache.layers]),
}


@pytest.mark.parametrize("how", list(COPIES))
@pytest.mark.parametrize("name", ["original", "vision"])
def test_a_copy_of_a_cache_is_followed_too(model: PreTrainedModel, name: str, how: str) -> None:
    inputs, ids = make_batch(model, SPECS), torch.tensor([[11], [12], [13]])
    mask, order = longer(inputs["attention_mask"]), torch.tensor([2, 0, 1])
    with METHODS[name](model):
        cache = cache_in(model(**inputs, use_cache=True))
        wanted = step(model, copy.deepcopy(cache), ids, mask)
        other = COPIES[how](cache)
        assert type(other.layers[0]).__name__ == "DynamicLayer"
        other.reorder_cache(order)
        assert torch.equal(step(model, other, ids[order], mask[order]), wanted[order])
        if how in ("deepcopy", "pickle", "copied layers"):
            assert torch.equal(step(model, cache, ids, mask), wanted), "the first one has its own order still"


def test_a_crop_and_another_order_go_together(model: PreTrainedModel) -> None:
    inputs, order = make_batch(model, SPECS), torch.tensor([2, 0, 1])
    ids, mask = torch.tensor([[11], [12], [13]]), longer(inputs["attention_mask"])
    with METHODS["original"](model):
        cache = cache_in(model(**inputs, use_cache=True))
        wanted = step(model, copy.deepcopy(cache), ids, mask)
        for first in ("crop", "reorder"):
            changed = copy.deepcopy(cache)
            step(model, changed, torch.tensor([[5, 6], [7, 8], [9, 10]]), longer(mask))
            if first == "crop":
                changed.crop(-2)
            changed.reorder_cache(order)
            if first == "reorder":
                changed.crop(-2)
            assert torch.equal(step(model, changed, ids[order], mask[order]), wanted[order])


def test_a_cache_that_is_emptied_is_as_new(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:1])
    for kind in ("dynamic", "static"):
        cache = make_cache(kind, model)
        kinds = [type(layer) for layer in cache.layers]
        with METHODS["original"](model):
            model(**inputs, past_key_values=cache)
            assert CacheState.of(cache) is not None
            cache.reset()
        assert CacheState.of(cache) is None
        assert [type(layer) for layer in cache.layers] == kinds
        if kind == "static":
            wanted = model(**inputs).logits
            assert torch.allclose(model(**inputs, past_key_values=cache).logits, wanted, atol=1e-5)


def test_nothing_is_left_where_nothing_was_dropped(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:1])
    with PyramidDrop(layers=[2, 4, 6], keep=[1.0] * 3)(model):
        cache = cache_in(model(**inputs, use_cache=True))
    assert CacheState.of(cache) is None
    assert {type(layer) for layer in cache.layers} == {
        type(layer) for layer in DynamicCache(config=model.config.text_config).layers
    }


def test_a_cache_is_freed_with_its_last_name(model: PreTrainedModel) -> None:
    """No cycle holds the keys until the garbage collector comes."""
    gc.disable()
    try:
        with METHODS["original"](model):
            cache = cache_in(model(**make_batch(model, SPECS), use_cache=True))
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


# --- A pruned cache where it cannot be followed ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_bare_model_refuses_a_pruned_cache(name: str, attention: str) -> None:
    model = tiny_model("llava-gqa", attention)
    inputs = make_batch(model, SPECS[:2])
    for kind in ("dynamic", "static"):
        if kind == "static" and name in ("vision", "vision compact", "downsample"):
            continue
        cache = make_cache(kind, model)
        with METHODS[name](model):
            model(**inputs, past_key_values=cache)
        ids, mask = torch.tensor([[11], [12]]), longer(inputs["attention_mask"])
        for length in (1, 3):
            with pytest.raises(ValueError, match="has no method on it"):
                step(model, cache, ids.repeat(1, length), longer(inputs["attention_mask"], length))
        with METHODS[name](model):  # the same method may go on with it
            assert step(model, cache, ids, mask).isfinite().all()


def test_another_kind_of_method_refuses_a_pruned_cache(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:2])
    for first, second, message in (
        ("original", "vision", r"cannot be continued by a method that drops before layers \[0\]"),
        ("vision", "original", r"was pruned before layers \[0\]"),
        ("vision", "vision compact", "with positions='compact'"),
    ):
        with METHODS[first](model):
            cache = cache_in(model(**inputs, use_cache=True))
        with METHODS[second](model), pytest.raises(ValueError, match=message):
            step(model, cache, torch.tensor([[11], [12]]), longer(inputs["attention_mask"]))


def test_another_batch_refuses_what_was_dropped_before_the_decoder(model: PreTrainedModel) -> None:
    with METHODS["vision"](model):
        cache = cache_in(model(**make_batch(model, SPECS[:1]), use_cache=True))
        with pytest.raises(ValueError, match="batch of 1; this call has a batch of 2"):
            step(model, cache, torch.tensor([[11], [12]]), torch.ones(2, 29, dtype=torch.long))


def test_a_crop_into_the_prompt_is_refused_before_the_decoder(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:1])
    with METHODS["vision"](model):
        cache = cache_in(model(**inputs, use_cache=True))
        cache.crop(-9)
        with pytest.raises(ValueError, match="cropped by 9 tokens, into visual tokens of which some were dropped"):
            step(model, cache, torch.tensor([[11]]), inputs["attention_mask"][:, :-8])


def test_keys_that_something_else_removed_are_noticed(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:1])
    for layers in ([2], [0], range(4, 8)):
        with METHODS["original"](model):
            cache = cache_in(model(**inputs, use_cache=True))
            for index in layers:
                layer = cache.layers[index]
                layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
            with pytest.raises(ValueError, match="something else has removed keys"):
                step(model, cache, torch.tensor([[11]]), longer(inputs["attention_mask"]))


def test_a_cache_that_was_rebuilt_from_its_keys_is_noticed(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:1])
    with METHODS["original"](model):
        rebuilt = DynamicCache(list(cache_in(model(**inputs, use_cache=True))))
        with pytest.raises(ValueError, match="rebuilt from a pruned cache's keys"):
            step(model, rebuilt, torch.tensor([[11]]), longer(inputs["attention_mask"]))


@pytest.mark.parametrize("layers", [[2], [0], range(8)])
@pytest.mark.parametrize("name", ["original", "vision"])
def test_keys_that_a_hook_removed_in_the_prompt_are_noticed(
    model: PreTrainedModel, name: str, layers: Iterable[int]
) -> None:
    """One key less in all layers is not what a crop leaves, for it is gone before the prompt is read."""

    def press(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache_of(kwargs).layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]

    decoder = model.model.language_model.layers
    hooks = [decoder[index].self_attn.register_forward_hook(press, with_kwargs=True) for index in layers]
    try:
        with METHODS[name](model), pytest.raises(ValueError, match="something else has removed keys"):
            model(**make_batch(model, SPECS[:1]), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("ratio", [0.02, 0.5])
@pytest.mark.parametrize("name", ["original", "vision"])
def test_a_cache_that_kvpress_pressed_is_refused_with_its_cause(
    model: PreTrainedModel, name: str, ratio: float
) -> None:
    """At 0.02 one key of some layers alone is removed. Its hook is called as Transformers before 5.3 called it."""
    kvpress = pytest.importorskip("kvpress")

    class Press(kvpress.KnormPress):  # type: ignore[misc, name-defined]
        def forward_hook(self, module: Any, input: Any, kwargs: Any, output: Any) -> Any:
            columns = torch.arange(kwargs["hidden_states"].shape[1])
            older = {"past_key_values": cache_of(kwargs), "cache_position": columns}
            return super().forward_hook(module, input, kwargs | older, output)

    inputs = make_batch(model, [[60, "image", 7]])
    with METHODS[name](model), Press(ratio)(model), pytest.raises(ValueError, match="something else has removed keys"):
        model(**inputs, use_cache=True)


def test_a_cache_without_layers_is_refused_by_name(model: PreTrainedModel) -> None:
    inputs = make_batch(model, SPECS[:1])
    cache = EncoderDecoderCache(make_cache("dynamic", model), make_cache("dynamic", model))
    with METHODS["original"](model), pytest.raises(ValueError, match="EncoderDecoderCache is not supported"):
        model(**inputs, past_key_values=cache)


def test_continuous_batching_is_refused_by_name(model: PreTrainedModel) -> None:
    ids = make_batch(model, SPECS[:1])["input_ids"].tolist()
    with METHODS["original"](model):
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch(inputs=ids, max_new_tokens=1)
        with pytest.raises(ValueError, match="continuous batching"):
            model.init_continuous_batching()
    assert "init_continuous_batching" not in model.__dict__
