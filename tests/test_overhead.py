"""What a method adds where launching is the time: operations, which are no timing and can be held, and hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from checks import HALVES, method_of
from pyramiddrop import FastV, Method, PyramidDrop
from pyramiddrop.hf.versions import cache_argument, output_cache
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import CpuClock
from pyramiddrop.speed.overhead import measure_overhead
from pyramiddrop.speed.predicted import choose_variants
from pyramiddrop.speed.subject import Subject, shape_subject
from tiny import make_batch, text_model, tiny_model


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def subject() -> Subject:
    return shape_subject("deep", torch.device("cpu"))


def variants(subject: Subject, *methods: str) -> list[MethodCost]:
    return list(choose_variants(methods, subject.info.shape, subject.prompt, print))


def test_a_prefill_of_three_drops_gets_few_operations_more_and_a_step_none(subject: Subject) -> None:
    vanilla, dropping, fastv = measure_overhead(subject, variants(subject), 1, 1, CpuClock())
    assert dropping.prefill_ops - vanilla.prefill_ops <= 120
    assert fastv.prefill_ops - vanilla.prefill_ops <= 50
    assert vanilla.step_ops == dropping.step_ops == fastv.step_ops


def test_a_batch_takes_few_more(subject: Subject) -> None:
    vanilla, dropping = measure_overhead(subject, variants(subject, "pyramiddrop"), 3, 1, CpuClock())
    assert dropping.prefill_ops - vanilla.prefill_ops <= 140
    assert vanilla.step_ops == dropping.step_ops


# --- Hooks ------------------------------------------------------------------------------------------------------------


def hooked(model: PreTrainedModel) -> set[bool]:
    """Whether each layer has a hook."""
    return {bool(layer._forward_pre_hooks) for layer in text_model(model).layers}


def step(model: PreTrainedModel, cache: Any, **given: Any) -> Tensor:
    ids = torch.full((1, 1), 7)
    logits: Tensor = model(input_ids=ids, **cache_argument(cache), **given).logits
    return logits


def test_layers_have_no_hooks_while_steps_change_nothing_for_them() -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[3, "image", 6]])
    with method_of(HALVES)(model) as trace:
        cache = output_cache(model(**inputs))
        lengths = trace.lengths
        step(model, cache)
        assert hooked(model) == {True}, "the first step shows that there is nothing to do"
        step(model, cache)
        assert hooked(model) == {False}
        assert [layer.keys.shape[2] for layer in cache.layers] == [length + 2 for length in lengths]
        model(**inputs)
        assert hooked(model) == {True}
        assert trace.lengths == lengths
    assert hooked(model) == {False}


def test_generate_takes_them_off_and_the_next_prompt_puts_them_on() -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[3, "image", 6]])
    with method_of(HALVES)(model) as trace:
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert hooked(model) == {False}
        lengths = trace.lengths
        again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(first, again)
    assert trace.lengths == lengths
    assert lengths[0] > lengths[-1]


@pytest.mark.parametrize("method", [method_of(HALVES), method_of(HALVES, positions="compact"), FastV()])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_with_and_without_hooks_give_the_same(method: Method, attention: str) -> None:
    """A hook of anybody's on a layer keeps ours there too, whose order would change."""
    model = tiny_model("llava-gqa", attention)
    inputs = make_batch(model, [[3, "image", 6]])
    found = []
    for foreign in (False, True):
        with method(model):
            handles = [
                layer.register_forward_pre_hook(lambda layer, given: None)
                for layer in text_model(model).layers
                if foreign
            ]
            cache = output_cache(model(**inputs))
            found.append(torch.cat([step(model, cache) for _ in range(3)]))
            assert hooked(model) == {foreign or attention == "eager" or method.positions == "compact"}
            for handle in handles:
                handle.remove()
    assert torch.equal(*found)


def test_padding_keeps_the_hooks() -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[3, "image", 6], [9]])
    with method_of(HALVES)(model):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert hooked(model) == {True}


def test_a_static_cache_keeps_them_for_good() -> None:
    """Graphs that are compiled on it would not notice that hooks are gone."""
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[3, "image", 6]])
    with method_of(HALVES)(model):
        model(**inputs, **cache_argument(StaticCache(config=model.config.text_config, max_cache_len=64)))
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert hooked(model) == {True}


def test_they_stay_while_a_backward_pass_will_run_layers_again() -> None:
    model = tiny_model("llava-gqa").train()
    inputs = make_batch(model, [[3, "image", 6]])
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) > 22, inputs["input_ids"], -100)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with method_of(HALVES)(model):
        with torch.enable_grad():
            loss = model(**inputs, labels=labels, use_cache=False).loss
        model.eval()
        cache = output_cache(model(**inputs))
        step(model, cache)
        step(model, cache)
        assert hooked(model) == {True}
        model.train()
        loss.backward()
        del loss
        model.eval()
        step(model, cache)
        assert hooked(model) == {False}


def test_threads_that_decode_and_prefill_at_once_give_what_each_gives_alone() -> None:
    model = tiny_model("llava-gqa")
    prompts = [make_batch(model, [[3 + number, "image", 6]], seed=number) for number in range(4)]
    with method_of(HALVES)(model):
        wanted = [model.generate(**inputs, max_new_tokens=6, do_sample=False) for inputs in prompts]
        found: dict[tuple[int, int], Tensor] = {}

        def work(number: int) -> None:
            with torch.no_grad():
                for turn in range(3):
                    found[number, turn] = model.generate(**prompts[number], max_new_tokens=6, do_sample=False)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 12
    for (number, _), ids in found.items():
        assert torch.equal(ids, wanted[number])


def test_a_method_that_comes_off_leaves_no_hook() -> None:
    model: nn.Module = tiny_model("llava-gqa")
    with PyramidDrop(layers=[2], keep=[0.5])(model):
        pass
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
