"""The shared prefix: a prefill that starts from a recorded one gives what a whole prefill gives, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from checks import generated
from pyramiddrop import PyramidDrop
from pyramiddrop.evaluation.prefill_replay import PrefillReplay
from pyramiddrop.hf import drop_layers, inspect_model
from pyramiddrop.scoring import AttentionScorer
from tiny import make_batch, tiny_model

STEPS = 3
SPECS: list[list[Any]] = [[5, "image", 7], [3, "image", 4]]


def same(one: Any, other: Any) -> bool:
    """Whether two generations have the same tokens and, to the bit, the same logits at every step."""
    pairs = zip(one.logits, other.logits, strict=True)
    return torch.equal(one.sequences, other.sequences) and all(torch.equal(*pair) for pair in pairs)


def check_cells(model: PreTrainedModel, inputs: dict[str, Tensor], layers: list[int]) -> None:
    """Every cell of (layers x shares) with the shared prefix is what it is without; recording changes nothing."""
    replay = PrefillReplay(inspect_model(model), layers)
    with torch.inference_mode():
        with replay.recorded():
            vanilla = generated(model, inputs, STEPS)
        assert same(vanilla, generated(model, inputs, STEPS))
        for layer in layers:
            for keep in (1.0, 0.5, 0.1):
                method = PyramidDrop(layers=[layer], keep=[keep])
                with method(model) as trace:
                    plain, plainly_kept = generated(model, inputs, STEPS), trace.stages[0].kept
                with method(model) as trace, replay.replayed(layer):
                    shared = generated(model, inputs, STEPS)
                assert same(plain, shared), (layer, keep)
                assert [k.tolist() for k in trace.stages[0].kept] == [k.tolist() for k in plainly_kept]
                assert same(shared, vanilla) == (keep == 1.0)


@pytest.mark.parametrize("family", ["llava", "llava-gqa", "next"])
def test_every_cell_equals_the_whole_prefill(family: str) -> None:
    model = tiny_model(family, layers=4)
    check_cells(model, make_batch(model, SPECS), [1, 3])


def test_layers_before_the_drop_do_not_run_again() -> None:
    model = tiny_model(layers=4)
    inputs = make_batch(model, SPECS[:1])
    info = inspect_model(model)
    replay = PrefillReplay(info, [2])
    runs: list[str] = []
    for index, layer in enumerate(info.layers):
        layer.self_attn.register_forward_hook(lambda *_, name=f"layer {index}": runs.append(name))
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append("vision"))
    with torch.inference_mode():
        with replay.recorded():
            generated(model, inputs, 1)
        assert runs == ["vision", "layer 0", "layer 1", "layer 2", "layer 3"]
        runs.clear()
        with PyramidDrop(layers=[2], keep=[0.5])(model), replay.replayed(2):
            generated(model, inputs, 2)
    assert runs == ["layer 2", "layer 3", "layer 0", "layer 1", "layer 2", "layer 3"]  # a prefill, a step


def test_the_model_is_untouched_after_an_error() -> None:
    model = tiny_model(layers=4)
    inputs = make_batch(model, SPECS[:1])
    before = [dict(module.__dict__) for module in model.modules()]
    replay = PrefillReplay(inspect_model(model), [2])
    with pytest.raises(RuntimeError, match="broken"), replay.recorded():
        raise RuntimeError("broken")
    with torch.inference_mode(), replay.recorded():
        generated(model, inputs, 1)
    with pytest.raises(RuntimeError, match="broken"), replay.replayed(2):
        raise RuntimeError("broken")
    assert all(
        before_names.keys() == module.__dict__.keys()
        for before_names, module in zip(before, model.modules(), strict=True)
    )


def test_layers_that_share_keys_are_not_shared() -> None:
    zoo = pytest.importorskip("zoo")
    assert not PrefillReplay.can_share(inspect_model(zoo.MEMBERS["gemma4-edge"].build(0)))
    assert PrefillReplay.can_share(inspect_model(tiny_model(layers=2)))


@pytest.mark.slow
def test_every_family() -> None:
    zoo = pytest.importorskip("zoo")
    checked = 0
    for member in zoo.MEMBERS.values():
        if {"generate", "use_cache"} & member.cannot.keys():
            continue
        model = member.build(0)
        try:
            info = inspect_model(model)
            layers = list(drop_layers(info, "next", AttentionScorer()))
            inputs = zoo.make_batch(member, model, [[5, "image", 7]])
            with PyramidDrop(layers=layers[:1], keep=[0.5])(model), torch.inference_mode():
                generated(model, inputs, 1)
        except ValueError:
            continue  # refused by name, which the conformance suite holds
        if PrefillReplay.can_share(info):
            check_cells(model, inputs, [layers[0], layers[-1]])
            checked += 1
    assert checked >= 60
