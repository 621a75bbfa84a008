"""Nothing changes when all is kept, and nothing stays behind when a method is taken off again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

import pyramiddrop
from checks import HALVES, KEEP_ALL, generated, method_of
from tiny import FAMILIES, IMPLEMENTATIONS, Answer, make_batch, text_model, tiny_model

MIXED = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]
TRAINING = [[3, "image", 4, Answer(3), 2, Answer(2)], [4, Answer(3)], [2, "image", 3]]

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def footprint(model: PreTrainedModel) -> dict[str, Any]:
    """All that a method could leave behind: hooks, attributes, classes, configuration, keys."""
    modules = dict(model.named_modules())
    return {
        "hooks": {name: [len(getattr(module, hooks)) for hooks in HOOKS] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "forward": {name: module.forward.__func__ for name, module in modules.items()},
        "config": model.config.to_dict(),
        "attention": [c._attn_implementation for c in (model.config, model.config.get_text_config())],
        "generation": model.generation_config.to_dict(),
        "keys": list(model.state_dict()),
    }


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- keep = 1 is the untouched model, bit for bit -------------------------------------------------------------------


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_with_all_kept(family: str, attention: str, side: str) -> None:
    model = tiny_model(family, attention)
    inputs = make_batch(model, MIXED, side)
    vanilla = logits_of(model, inputs)
    for positions in ("original", "compact"):
        with method_of(KEEP_ALL, positions=positions)(model):
            assert torch.equal(logits_of(model, inputs), vanilla)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llava", "next"])
def test_generate_with_all_kept(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    inputs = make_batch(model, MIXED)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        vanilla = generated(model, inputs, 4, **options)
        with method_of(KEEP_ALL)(model):
            patched = generated(model, inputs, 4, **options)
        assert torch.equal(patched.sequences, vanilla.sequences)
        assert all(torch.equal(a, b) for a, b in zip(patched.logits, vanilla.logits, strict=True))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llava-gqa", "next"])
def test_training_with_all_kept(family: str, attention: str) -> None:
    model = tiny_model(family, attention).train()
    inputs = make_batch(model, TRAINING, "right", labels=True)
    vanilla = model(**inputs).loss
    vanilla.backward()
    vanilla_gradients = gradients(model)
    for logits in ("full", "kept"):
        with method_of(KEEP_ALL, logits=logits)(model):
            loss = model(**inputs).loss
            loss.backward()
        patched_gradients = gradients(model)
        assert torch.equal(loss, vanilla)
        assert patched_gradients.keys() == vanilla_gradients.keys()
        assert all(torch.equal(patched_gradients[name], vanilla_gradients[name]) for name in vanilla_gradients)


# --- Nothing stays behind -------------------------------------------------------------------------------------------


def leave_block(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with method_of(HALVES)(model):
        generated(model, inputs, 2)


def apply_and_remove(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    pyramiddrop.apply(model, method_of(HALVES))
    generated(model, inputs, 2)
    pyramiddrop.remove(model)


def raise_in_block(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    def work_and_fail() -> None:
        with method_of(HALVES)(model):
            logits_of(model, inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work_and_fail()


def raise_in_forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ZeroDivisionError), method_of(HALVES)(model), broken_layer(model, 5):
        logits_of(model, inputs)


def raise_in_ranking(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ZeroDivisionError), method_of(HALVES)(model), broken_layer(model, 4, "self_attn.k_proj"):
        logits_of(model, inputs)


def never_run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with method_of(HALVES)(model):
        pass


def bad_arguments(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="layers"), method_of(HALVES, layers=[2, 4, 99])(model):
        pass


class broken_layer:
    """A module of a layer raises when it is called."""

    def __init__(self, model: PreTrainedModel, number: int, name: str = "mlp") -> None:
        self.module = text_model(model).layers[number].get_submodule(name)

    def __enter__(self) -> None:
        def fail(module: Any, args: Any) -> None:
            raise ZeroDivisionError

        self.handle = self.module.register_forward_pre_hook(fail)

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    "visit",
    [leave_block, apply_and_remove, raise_in_block, raise_in_forward, raise_in_ranking, never_run, bad_arguments],
)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_no_trace_is_left(visit: Callable[..., None], attention: str) -> None:
    model = tiny_model("llava", attention)
    inputs = make_batch(model, MIXED)
    before, vanilla = footprint(model), logits_of(model, inputs)
    tokens = generated(model, inputs, 3).sequences
    visit(model, inputs)
    assert footprint(model) == before
    assert torch.equal(logits_of(model, inputs), vanilla)
    assert torch.equal(generated(model, inputs, 3).sequences, tokens)


def test_a_patched_model_keeps_its_state_dict() -> None:
    model = tiny_model()
    keys = list(model.state_dict())
    with method_of(HALVES)(model):
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == [name for name, _ in tiny_model().named_modules()]


def test_an_exception_in_forward_leaves_the_method_working() -> None:
    model = tiny_model()
    inputs, other = make_batch(model, MIXED), make_batch(model, [[2, "image", 3]], seed=7)
    with method_of(HALVES)(model) as trace:
        expected = logits_of(model, other)
        kept = [stage.kept[0].tolist() for stage in trace.stages]
        with pytest.raises(ZeroDivisionError), broken_layer(model, 5):
            logits_of(model, inputs)
        assert torch.equal(logits_of(model, other), expected)
        assert [stage.kept[0].tolist() for stage in trace.stages] == kept


def test_the_same_method_can_be_used_again() -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    method = method_of(HALVES)
    with method(model):
        first = logits_of(model, inputs)
    with method(model):
        assert torch.equal(logits_of(model, inputs), first)


# --- One method on a model at a time; models and copies do not know each other --------------------------------------


def test_applying_twice_is_an_error() -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    before, vanilla = footprint(model), logits_of(model, inputs)
    pyramiddrop.apply(model, method_of(HALVES))
    patched = logits_of(model, inputs)
    for method in (method_of(HALVES), pyramiddrop.FastV(layer=3, keep=0.5)):
        with pytest.raises(RuntimeError, match="already"):
            pyramiddrop.apply(model, method)
        assert torch.equal(logits_of(model, inputs), patched)
    pyramiddrop.remove(model)
    assert footprint(model) == before
    assert torch.equal(logits_of(model, inputs), vanilla)


def test_nesting_is_an_error_and_the_outer_method_goes_on() -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    before, vanilla = footprint(model), logits_of(model, inputs)
    with method_of(HALVES)(model):
        patched = logits_of(model, inputs)
        with pytest.raises(RuntimeError, match="already"):
            method_of(HALVES, positions="compact")(model).__enter__()
        assert torch.equal(logits_of(model, inputs), patched)
    assert footprint(model) == before
    assert torch.equal(logits_of(model, inputs), vanilla)


def test_two_models_at_once() -> None:
    one, two = tiny_model("llava"), tiny_model("llava", seed=3)
    inputs = make_batch(one, MIXED)
    with method_of(HALVES)(one):
        alone_one = logits_of(one, inputs)
    with method_of(HALVES, keep=[0.9, 0.8, 0.7])(two):
        alone_two = logits_of(two, inputs)
    vanilla_two = logits_of(two, inputs)
    method = method_of(HALVES)
    with method(one) as trace_one:
        with method_of(HALVES, keep=[0.9, 0.8, 0.7])(two) as trace_two:
            assert torch.equal(logits_of(one, inputs), alone_one)
            assert torch.equal(logits_of(two, inputs), alone_two)
            assert len(trace_one.stages[0].kept[0]) == 8
            assert len(trace_two.stages[0].kept[0]) == 14
        assert torch.equal(logits_of(two, inputs), vanilla_two)
        assert torch.equal(logits_of(one, inputs), alone_one)
        with method(two):  # one method object on two models
            assert torch.equal(logits_of(one, inputs), alone_one)


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model = tiny_model()
    inputs, other = make_batch(model, MIXED), make_batch(model, [[2, "image", 3]], seed=7)
    before, vanilla = footprint(model), logits_of(model, inputs)
    trace = pyramiddrop.apply(model, method_of(HALVES))
    patched = logits_of(model, inputs)
    twin = copy.deepcopy(model)
    logits_of(twin, other)
    assert trace.visual_tokens == [16, 32, 0], "the copy wrote into the original's trace"
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)  # its own weights are used, and only by it
    torch.testing.assert_close(logits_of(twin, inputs), patched * 2)
    assert torch.equal(logits_of(model, inputs), patched)

    pyramiddrop.remove(twin)
    torch.testing.assert_close(logits_of(twin, inputs), vanilla * 2)
    assert footprint(twin) == before
    assert torch.equal(logits_of(model, inputs), patched)

    other_twin = copy.deepcopy(model)
    pyramiddrop.remove(model)
    assert torch.equal(logits_of(model, inputs), vanilla)
    assert footprint(model) == before
    assert torch.equal(logits_of(other_twin, inputs), patched)
    pyramiddrop.remove(other_twin)
    assert torch.equal(logits_of(other_twin, inputs), vanilla)


def test_a_patched_model_can_be_pickled() -> None:
    model = tiny_model()
    inputs = make_batch(tiny_model(), MIXED)
    pyramiddrop.apply(model, method_of(HALVES))
    loaded = pickle.loads(pickle.dumps(model))  # before its first call: Transformers then adds hooks that do not pickle
    patched = logits_of(model, inputs)
    assert torch.equal(logits_of(loaded, inputs), patched)
    pyramiddrop.remove(loaded)
    assert torch.equal(logits_of(model, inputs), patched)
    pyramiddrop.remove(model)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_a_patched_model_can_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    vanilla = logits_of(model, inputs)
    with method_of(HALVES)(model):
        model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert torch.equal(logits_of(loaded, inputs), vanilla)
