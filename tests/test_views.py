"""Views: several methods at once on one set of weights, each on a model object of its own."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyramiddrop import (
    FastV,
    Method,
    PyramidDrop,
    UniformDrop,
    VisionDrop,
    apply,
    current_method,
    remove,
    trace_of,
)
from tiny import make_batch, text_model, tiny_model

MIXED: list[list[Any]] = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]
STAGED = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
METHODS: list[Method] = [STAGED, FastV(layer=3), UniformDrop(layers=[2], keep=[0.5]), VisionDrop(keep=0.25)]


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def tensors(model: nn.Module) -> dict[str, int]:
    """Where each parameter and buffer of a model lies."""
    return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def footprint(model: nn.Module) -> dict[str, Any]:
    return {
        name: (id(module), {key: id(value) for key, value in vars(module).items()}, list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_view_drops_as_an_applied_method_and_the_model_stays_as_it_is(method: Method) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)
    vanilla = logits_of(model, inputs)
    with method(model) as trace:
        expected, kept = logits_of(model, inputs), [stage.kept for stage in trace.stages]
    before = footprint(model)
    view = method.view(model)
    assert footprint(model) == before
    assert tensors(view) == tensors(model)
    assert all(mine is other for mine, other in zip(view.parameters(), model.parameters(), strict=True))
    assert torch.equal(logits_of(view, inputs), expected)
    assert torch.equal(logits_of(model, inputs), vanilla)
    assert current_method(view) == method
    assert current_method(model) is None
    for stage, rows in zip(trace_of(view).stages, kept, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(stage.kept, rows, strict=True))
    remove(view)
    assert torch.equal(logits_of(view, inputs), vanilla)
    with pytest.raises(RuntimeError, match="no pyramiddrop method is applied"):
        trace_of(view)


def test_the_weights_are_one() -> None:
    model = tiny_model("llava-gqa", tie_word_embeddings=True)
    model.tie_weights()
    view, inputs = STAGED.view(model), make_batch(model, MIXED)
    assert view.lm_head.weight is text_model(model).embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(logits_of(view, inputs), logits_of(STAGED.view(model), inputs))
    other = tiny_model("llava-gqa", seed=3)
    model.load_state_dict(other.state_dict(), strict=False)
    with STAGED(model):
        assert torch.equal(logits_of(view, inputs), logits_of(model, inputs))


def test_a_view_has_its_own_mode_and_configuration() -> None:
    model = tiny_model("llava-gqa")
    view = STAGED.view(model)
    view.train()
    view.set_attn_implementation("eager")
    view.generation_config.max_new_tokens = 3
    assert not any(module.training for module in model.modules())
    assert text_model(model).config._attn_implementation == "sdpa"
    assert model.generation_config.max_new_tokens is None


def test_a_view_has_this_method_alone() -> None:
    model, inputs = tiny_model("llava-gqa"), make_batch(tiny_model("llava-gqa"), MIXED)
    with METHODS[1](model):
        expected = logits_of(model, inputs)
    apply(model, STAGED)
    dropped = logits_of(model, inputs)
    for patched in (model, STAGED.view(model)):
        view = METHODS[1].view(patched)
        assert torch.equal(logits_of(view, inputs), expected)
        assert current_method(patched) == STAGED
    assert torch.equal(logits_of(model, inputs), dropped)


def test_a_view_can_be_made_while_the_model_generates(recwarn: pytest.WarningsRecorder) -> None:
    model, views = tiny_model("llava-gqa"), list[Any]()

    class Make:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            views.append(METHODS[1].view(model))
            return scores

    inputs = make_batch(model, MIXED)
    with STAGED(model):
        expected = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=[Make()])
    assert torch.equal(ids, expected)
    assert [current_method(view) for view in views] == [METHODS[1]] * 2
    assert not [warning for warning in recwarn if "pyramiddrop" in str(warning.message)]


def test_a_view_saves_its_method(tmp_path: Path) -> None:
    model = tiny_model("llava-gqa")
    view = STAGED.view(model)
    view.save_pretrained(tmp_path / "view")
    model.save_pretrained(tmp_path / "model")
    assert PyramidDrop.from_pretrained(tmp_path / "view") == STAGED
    assert not (tmp_path / "model" / "pyramiddrop.json").exists()
    loaded = type(model).from_pretrained(tmp_path / "view").eval()
    inputs = make_batch(model, MIXED)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_many_methods_at_once_from_many_threads() -> None:
    model = tiny_model("llava-gqa")
    jobs = [
        make_batch(model, specs, seed=seed) for seed, specs in enumerate((MIXED, [[5, "image", 7]], [[2, "image"]]))
    ]
    ways: list[Any] = [model, *(method.view(model) for method in METHODS)]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    alone = [[way.generate(**job, **options) for job in jobs] for way in ways]
    wrong: list[tuple[int, int]] = []

    def work(shift: int) -> None:
        for turn in range(len(ways)):
            way = (turn + shift) % len(ways)
            for number, job in enumerate(jobs):
                if not torch.equal(ways[way].generate(**job, **options), alone[way][number]):
                    wrong.append((way, number))

    run_threads(work, 3)
    assert wrong == []


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llava-gqa"), config).eval()
    inputs = make_batch(model.base_model.model, MIXED)
    vanilla = logits_of(model, inputs)
    with STAGED(model):
        expected = logits_of(model, inputs)
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    view = STAGED.view(model)
    assert tensors(view) == tensors(model)
    assert torch.equal(logits_of(view, inputs), expected)
    assert torch.equal(view.generate(**inputs, max_new_tokens=3, do_sample=False), ids)
    with view.disable_adapter():
        assert torch.equal(logits_of(model, inputs), vanilla)


@pytest.mark.parametrize("place", ["dispatched", "offloaded"])
def test_accelerates_hooks_come_along(place: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model: Any = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)
    with STAGED(model):
        expected = logits_of(model, inputs)
    if place == "offloaded":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    view = STAGED.view(model)
    assert torch.equal(logits_of(view, inputs), expected)
    hooked = [module for module in view.modules() if hasattr(module, "_hf_hook")]
    assert hooked
    assert all(module.forward.args == (module,) for module in hooked), "a hook runs the original's module"
    if place == "dispatched":
        assert view.to(torch.float32) is view
    else:
        assert all(parameter.device.type == "meta" for parameter in text_model(view).parameters())


def test_tensors_beside_the_parameters_are_shared() -> None:
    """Quantised layers keep some in plain objects (bitsandbytes' 8-bit state)."""

    class State:
        pass

    model = tiny_model("llava-gqa")
    state: Any = State()
    state.weight, state.scales = torch.ones(3), {"scale": torch.ones(3)}
    layer: Any = text_model(model).layers[0].mlp.gate_proj
    layer.state = state
    copied: Any = text_model(STAGED.view(model)).layers[0].mlp.gate_proj.state
    assert copied is not state
    assert copied.weight is state.weight
    assert copied.scales["scale"] is state.scales["scale"]


def test_what_would_run_the_original_is_refused() -> None:
    model = tiny_model("llava-gqa")
    model.forward = torch.compile(model.forward)
    with pytest.raises(ValueError, match="the forward of its LlavaForConditionalGeneration was replaced"):
        STAGED.view(model)
    assert isinstance(STAGED.view(torch.compile(tiny_model("llava-gqa"))), torch._dynamo.OptimizedModule)


# --- One patched model, many threads --------------------------------------------------------------------------------


def run_threads(work: Any, count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("method", [STAGED, VisionDrop(keep=0.25)], ids=lambda method: type(method).__name__)
def test_threads_on_one_patched_model(method: Method) -> None:
    """Each answer is its own call's, and whenever the trace is read, it tells of one prefill."""
    model = tiny_model("llava-gqa")
    jobs = [make_batch(model, [[5 + n, *["image"] * n]], seed=n) for n in (1, 2, 3)]
    told: dict[int, tuple[Any, ...]] = {}
    wrong: list[str] = []

    def tells(trace: Any) -> tuple[Any, ...]:
        return trace.lengths, [stage.kept[0].tolist() for stage in trace.stages], trace.cost()

    with torch.no_grad(), method(model) as trace:
        expected = [logits_of(model, job) for job in jobs]
        for job in jobs:
            logits_of(model, job)
            told[trace.visual_tokens[0]] = tells(trace)

        def work(shift: int) -> None:
            for turn in range(8):
                number = (turn + shift) % len(jobs)
                if not torch.equal(logits_of(model, jobs[number]), expected[number]):
                    wrong.append("logits")
                seen = copy.copy(trace)
                if told[seen.visual_tokens[0]] != tells(seen):
                    wrong.append("trace")

        run_threads(work, 3)
    assert wrong == []


def test_a_prefill_that_fails_leaves_the_trace_of_the_one_before() -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)

    def fail(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise KeyError("mine")

    with STAGED(model) as trace:
        logits_of(model, inputs)
        before = (trace.lengths, len(trace.stages), trace.visual_tokens)
        handle = text_model(model).layers[5].register_forward_pre_hook(fail, with_kwargs=True)
        with pytest.raises(KeyError, match="mine"):
            logits_of(model, make_batch(model, [[4, "image", 3]]))
        handle.remove()
        assert (trace.lengths, len(trace.stages), trace.visual_tokens) == before


def test_a_generation_that_starts_after_its_block_is_warned_about() -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)
    expected = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with STAGED(model):
        generate = model.generate
    with pytest.warns(UserWarning, match="starts after the method was taken off: nothing is dropped"):
        assert torch.equal(generate(**inputs, max_new_tokens=2, do_sample=False), expected)


def test_a_block_that_is_left_while_a_thread_generates_is_warned_about() -> None:
    model = tiny_model("llava-gqa")
    started, go_on = threading.Event(), threading.Event()

    class Wait:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            started.set()
            go_on.wait(60)
            return scores

    def answer() -> None:
        model.generate(**make_batch(model, MIXED), max_new_tokens=1, do_sample=False, logits_processor=[Wait()])

    thread = threading.Thread(target=answer)
    applied = STAGED(model)
    applied.__enter__()
    thread.start()
    assert started.wait(60)
    with pytest.warns(UserWarning, match="taken off while another thread still generates with it"):
        applied.__exit__(None, None, None)
    go_on.set()
    thread.join()
    with warnings.catch_warnings(), STAGED(model):
        warnings.simplefilter("error", UserWarning)
        answer()
