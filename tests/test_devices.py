"""A model over several devices, or with weights that are loaded when they are needed, by accelerate's own hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import kept_columns
from pyramiddrop import Downsample, FastV, Method, PyramidDrop, RandomDrop, UniformDrop, VisionDrop
from pyramiddrop.hf import inspect_model
from pyramiddrop.scoring import SCORERS
from tiny import Answer, make_batch, text_model, tiny_model

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import attach_align_device_hook_on_blocks  # noqa: E402

from fake_devices import fake_devices, on_device, spread  # noqa: E402

ALONE: list[list[Any]] = [[5, "image", 7]]
BATCH: list[list[Any]] = [[5, "image", 7], [3, "image", 2, "image", 4], [9]]
STAGES: dict[str, Any] = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}  # the second device begins at layer 4
METHODS: dict[str, Method] = {
    "next": PyramidDrop(**STAGES),
    "last": PyramidDrop(**STAGES, rank_layer="last"),
    "compact": PyramidDrop(**STAGES, positions="compact"),
    "last-compact": PyramidDrop(**STAGES, rank_layer="last", positions="compact"),
    "merge": PyramidDrop(**STAGES, merge=True),
    "per-image": PyramidDrop(**STAGES, per_image=True),
    "reserve": PyramidDrop(**STAGES, reserve=0.5),
    "fastv": FastV(layer=5),
    "random": RandomDrop(**STAGES),
    "uniform": UniformDrop(**STAGES),
    "vision": VisionDrop(keep=0.5),
    "vision-compact": VisionDrop(keep=0.5, positions="compact"),
    "downsample": Downsample(keep=0.5),
    **{score: PyramidDrop(**STAGES, score=score) for score in SCORERS if score != "vision"},
}


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options)


def two(model: Any, first: int = 4) -> Any:
    """A copy of `model` over two devices, the second from layer `first` on."""
    model = copy.deepcopy(model)
    return spread(model, text_model(model).layers, first)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("name", METHODS)
def test_generation_over_two_devices(name: str) -> None:
    model, method = tiny_model("llava-gqa"), METHODS[name]
    inputs = make_batch(model, BATCH)
    with method(model) as trace:
        expected = generated(model, inputs).sequences
        kept = kept_columns(trace)
    with fake_devices(), method(spreaded := two(model)) as trace:
        found = generated(spreaded, on_device(inputs, 0)).sequences
        assert kept_columns(trace) == kept
        assert trace.cost().flops_ratio < 1
    assert torch.equal(found, expected)


def test_generation_without_a_cache() -> None:
    model, method = tiny_model("llava-gqa"), METHODS["last-compact"]
    inputs = make_batch(model, ALONE)
    with method(model):
        expected = generated(model, inputs, use_cache=False).sequences
    with fake_devices(), method(spreaded := two(model)):
        found = generated(spreaded, on_device(inputs, 0), use_cache=False).sequences
    assert torch.equal(found, expected)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("first", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["next", "last", "merge", "variation"])
def test_wherever_the_second_device_begins(name: str, first: int) -> None:
    model, method = tiny_model("llava-gqa"), METHODS[name]
    inputs = make_batch(model, BATCH)
    with torch.no_grad(), method(model):
        expected = model(**inputs).logits
    with torch.no_grad(), fake_devices(), method(spreaded := two(model, first)):
        found = spreaded(**on_device(inputs, 0)).logits
    assert torch.equal(found, expected)


def test_the_callers_tensors_may_be_elsewhere() -> None:
    """accelerate moves them behind our backs: from the CPU, say."""
    model = tiny_model("llava-gqa", attention="eager")
    inputs = make_batch(model, BATCH)
    for method in (METHODS["next"], METHODS["last-compact"], METHODS["vision"]):
        with torch.no_grad(), method(model):
            expected = model(**inputs, output_attentions=True, output_hidden_states=True)
        with torch.no_grad(), fake_devices(), method(spreaded := two(model)):
            found = spreaded(**on_device(inputs, "cpu"), output_attentions=True, output_hidden_states=True)
        assert torch.equal(found.logits, expected.logits)
        for name in ("hidden_states", "attentions"):
            assert all(torch.equal(a, b) for a, b in zip(found[name], expected[name], strict=True))


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", ["next", "last", "compact", "merge", "key_norm"])
@pytest.mark.parametrize("turn", [[3], [2, "image", 3]], ids=["text", "image"])
def test_a_further_turn(name: str, turn: list[Any]) -> None:
    model, method = tiny_model("llava-gqa"), METHODS[name]
    first, second = make_batch(model, ALONE), make_batch(model, [turn], seed=5)

    def talk(model: Any, place: Any) -> tuple[Tensor, Tensor]:
        answer = generated(model, place(first), return_dict_in_generate=True)
        ids = torch.cat([answer.sequences, place(second)["input_ids"]], 1)
        inputs = place({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if "pixel_values" in second:
            inputs["pixel_values"] = place(second)["pixel_values"]
        return answer.sequences, generated(model, inputs, past_key_values=answer.past_key_values).sequences

    with method(model):
        expected = talk(model, dict)
    with fake_devices(), method(spreaded := two(model)):
        found = talk(spreaded, lambda values: on_device(values, 0))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("logits", ["full", "kept"])
def test_training(logits: str) -> None:
    model = tiny_model("llava-gqa")
    method = PyramidDrop(**STAGES, logits=logits)
    inputs = make_batch(model, [[5, "image", 7, Answer(3)], [3, "image", 2, Answer(2), 4, Answer(2)]], labels=True)

    def step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
        loss = model.train()(**inputs).loss
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()]

    with method(alone := copy.deepcopy(model)):
        expected, gradients = step(alone, inputs)
    with fake_devices(), method(spreaded := two(model)):
        found, others = step(spreaded, on_device(inputs, 0))
    assert torch.equal(found, expected)
    for mine, other in zip(gradients, others, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("rank_layer", ["next", "last"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3n", "lfm2_vl", "granite4_vision"])
def test_families(name: str, rank_layer: str) -> None:
    """Positions of three axes, DeepStack's features, shared keys, recurrent layers, features between layers."""
    pytest.importorskip("transformers", minversion="5.23")
    import zoo

    model, method = zoo.MEMBERS[name].build(0), PyramidDrop(stages=2, rank_layer=rank_layer)
    inputs, layers = zoo.make_batch(zoo.MEMBERS[name], model, [[3, "image", 7]]), len(inspect_model(model).layers)
    with torch.no_grad(), method(model):
        expected = model(**inputs).logits
    spread(model, inspect_model(model).layers, layers // 2)
    with torch.no_grad(), fake_devices(), method(model):
        found = model(**on_device(inputs, 0)).logits
    assert torch.equal(found, expected)


# --- Weights that are loaded when they are needed -------------------------------------------------------------------


def offloaded(model: Any, where: str, folder: Path) -> Any:
    model = copy.deepcopy(model)
    skipped = model._skip_keys_device_placement
    if where == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if where == "disk":
        return accelerate.disk_offload(model, folder, torch.device("cpu"))
    if where == "buffers":
        return accelerate.disk_offload(model, folder, torch.device("cpu"), offload_buffers=True)
    if where == "whole layers":
        classes = [type(text_model(model).layers[0]).__name__]
        return accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=classes)
    layers = {f"model.language_model.layers.{number}": "disk" if number in (2, 5) else "cpu" for number in range(8)}
    text = [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
    others = dict.fromkeys([*text, "model.vision_tower", "model.multi_modal_projector", "lm_head"], "cpu")
    return accelerate.dispatch_model(model, layers | others, offload_dir=folder, skip_keys=skipped)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("where", ["cpu", "disk", "buffers", "whole layers", "some layers"])
@pytest.mark.parametrize("name", ["next", "last-compact", "fastv", "vision"])
def test_offloaded_weights(name: str, where: str, tmp_path: Path) -> None:
    model, method = tiny_model("llava-gqa", tie_word_embeddings=True), METHODS[name]
    model.tie_weights()
    inputs = make_batch(model, BATCH)
    with method(model):
        expected = generated(model, inputs).sequences
    away = offloaded(model, where, tmp_path)
    before = [(name, parameter.device) for name, parameter in away.named_parameters()]
    assert "meta" in {device.type for _, device in before}
    with method(away):
        assert torch.equal(generated(away, inputs).sequences, expected)
    assert [(name, parameter.device) for name, parameter in away.named_parameters()] == before


# --- Two real devices -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu_and_the_cpu(name: str) -> None:
    """The last layers compute on the CPU: two devices that no make-believe is needed for."""
    model, method = tiny_model("llava-gqa"), METHODS[name]
    inputs = make_batch(model, BATCH)
    with method(model) as trace:
        expected = generated(model, inputs).sequences
        kept = kept_columns(trace)
    layers = {f"model.language_model.layers.{number}": "cuda" if number < 4 else "cpu" for number in range(8)}
    text = {f"model.language_model.{part}": "cuda" for part in ("embed_tokens", "norm", "rotary_emb")}
    others = dict.fromkeys(["", "model.vision_tower", "model.multi_modal_projector", "lm_head"], "cuda")
    places = {block: torch.device(place) for block, place in (layers | text | others).items()}
    offload = dict.fromkeys(filter(None, places), False)
    attach_align_device_hook_on_blocks(model, places, offload, skip_keys=model._skip_keys_device_placement)
    for block, place in places.items():
        if block:
            model.get_submodule(block).to(place)
    with method(model) as trace:
        found = generated(model, {key: value.cuda() for key, value in inputs.items()}).sequences
    assert torch.equal(found.cpu(), expected)
    assert kept_columns(trace) == kept
