"""The KV cache under either of its names, and Transformers that are newer than those that were tested."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pyramiddrop import PyramidDrop, UniformDrop, VisionDrop, apply, remove
from pyramiddrop.hf import versions
from pyramiddrop.hf.versions import CACHE_NAME, CACHE_NAMES, cache_argument, cache_names, output_cache
from tiny import make_batch, tiny_model

HALVES = PyramidDrop(layers=[2, 5], keep=[0.5, 0.25])


def renamed(name: str) -> bool:
    """Whether the models of this Transformers take their cache under this name."""
    return name in cache_names(tiny_model().forward)


def prefilled(model: PreTrainedModel) -> tuple[dict[str, Tensor], Any]:
    """A second turn, and the cache of the first one."""
    inputs = make_batch(model, [[5, "image", 7]])
    second = {"input_ids": torch.tensor([[33, 44]]), "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 2)}
    cache = DynamicCache(config=model.config.get_text_config())
    return second, output_cache(model(**inputs, **cache_argument(cache)))


# --- Which names ----------------------------------------------------------------------------------------------------


def test_the_installed_name_is_the_one_of_outputs_and_models() -> None:
    model = tiny_model()
    assert ("cache" if int(transformers.__version__.split(".")[1]) >= 24 else "past_key_values") == CACHE_NAME
    for module in (model, model.model, model.model.language_model, model.model.language_model.layers[0]):
        assert cache_names(module.forward)[0] == CACHE_NAME


def test_a_forward_that_takes_one_name_alone() -> None:
    def new(hidden: Tensor, cache: Any = None) -> None: ...

    def old(hidden: Tensor, past_key_values: Any = None, **kwargs: Any) -> None: ...

    def neither(*args: Any, **kwargs: Any) -> None: ...

    assert [cache_names(forward) for forward in (new, old, neither)] == [("cache",), ("past_key_values",), ()]


# --- The model takes what it takes without a method -----------------------------------------------------------------


@pytest.mark.parametrize("given", [("cache",), ("past_key_values",), ("cache", "past_key_values")])
@pytest.mark.parametrize("empty", [False, True])
@torch.no_grad()
def test_either_name_is_read_as_the_model_reads_it(given: tuple[str, ...], empty: bool) -> None:
    """Also where the name that counts holds nothing, and where the model does not know a name."""
    model = tiny_model()
    with HALVES(model):
        second, cache = prefilled(model)
    caches = {name: copy.deepcopy(cache) for name in given}
    if empty:
        caches[given[0]] = None
    read = next((caches[name] for name in cache_names(model.forward) if name in caches), None)
    if read is None:
        second["attention_mask"] = torch.ones_like(second["input_ids"])
        expected = model(**second).logits
    with HALVES(model):
        if read is not None:
            expected = model(**second, **cache_argument(copy.deepcopy(read))).logits
        assert torch.equal(model(**second, **caches).logits, expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_pruned_cache_goes_on_under_either_name(name: str) -> None:
    model = tiny_model()
    if not renamed(name):
        pytest.skip(f"this Transformers has no argument {name!r}")
    with HALVES(model):
        second, cache = prefilled(model)
        expected = model(**second, **cache_argument(copy.deepcopy(cache))).logits
        assert torch.equal(model(**second, **{name: cache}).logits, expected)


@torch.no_grad()
def test_inside_a_wrapper_that_passes_its_arguments_on() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = tiny_model()
    wrapper = Wrapper(model)
    with HALVES(model):
        second, cache = prefilled(model)
        expected = model(**second, **cache_argument(copy.deepcopy(cache))).logits
    with HALVES(wrapper):
        for name in filter(renamed, CACHE_NAMES):
            assert torch.equal(wrapper(**second, **{name: copy.deepcopy(cache)}).logits, expected)


@torch.no_grad()
def test_an_argument_that_comes_twice_is_the_models_own_error() -> None:
    model = tiny_model()
    ids = torch.tensor([[33, 44]])
    with HALVES(model), pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids)


@pytest.mark.parametrize("method", [HALVES, UniformDrop(positions="compact")])
def test_cached_answers_are_uncached_answers(method: Any) -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7], [3, "image", 9]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with method(model):
        cached, uncached = (
            torch.stack(model.generate(**inputs, **options, output_logits=True, use_cache=use).logits)
            for use in (True, False)
        )
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)


# --- A cache cropped to a length, before Transformers 5.18 -----------------------------------------------------------


# --- Newer than what was tested -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "said"), [("5.24.9", 0), ("5.25.0.dev0", 1), ("6.0.0", 1), (transformers.__version__, 0)]
)
def test_a_newer_transformers_is_named_once(monkeypatch: pytest.MonkeyPatch, installed: str, said: int) -> None:
    versions.warn_if_untested.cache_clear()
    monkeypatch.setattr(transformers, "__version__", installed)
    model = tiny_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with HALVES(model):
            model(**make_batch(model, [[5, "image", 7]]))
        apply(model, HALVES)
        remove(model)
    versions.warn_if_untested.cache_clear()
    told = [warning for warning in caught if "is tested up to Transformers 5.24" in str(warning.message)]
    assert len(told) == said
    assert all(f"{installed} is installed" in str(warning.message) for warning in told)
    assert all(warning.filename == __file__ for warning in told)


# --- A cache is cropped to a length, where it can be ----------------------------------------------------------------


@pytest.mark.skipif(versions._installed() >= (5, 18), reason="caches are cropped by a count alone")
@pytest.mark.parametrize(
    "copied", [lambda cache: cache, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
)
@pytest.mark.parametrize("method", [HALVES, VisionDrop(keep=0.5)], ids=["inside", "before"])
@torch.no_grad()
def test_a_length_is_of_the_full_sequence(method: Any, copied: Any) -> None:
    """Every layer forgets the same tokens, though those behind a drop hold fewer."""
    model = tiny_model()

    def third_turn(crop: int) -> Tensor:
        second, cache = prefilled(model)
        cache = copied(output_cache(model(**second, **cache_argument(cache))))
        cache.crop(crop)
        mask = second["attention_mask"]
        return model(input_ids=torch.tensor([[55]]), attention_mask=mask, **cache_argument(cache)).logits

    with method(model):
        columns = prefilled(model)[0]["attention_mask"].shape[1]
        assert torch.equal(third_turn(columns - 1), third_turn(-1))
