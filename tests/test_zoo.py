"""The zoo's models without this package: what the conformance suite may expect of each family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conformance.setups import FAST
from pyramiddrop.hf.versions import cache_argument, output_cache
from zoo import MEMBERS, Answer, Member, make_batch, make_rows
from zoo.pieces import IGNORED, Inputs, Row, collate

SPECS = [[5, "image", 7], [11], [4, "image", 3, "image", Answer(6)]]
NEW_TOKENS = 4


@cache
def model_of(name: str) -> PreTrainedModel:
    """The member's model; tests leave it as they found it."""
    return MEMBERS[name].build(0)


@pytest.fixture(params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MEMBERS])
def member(request: pytest.FixtureRequest) -> Member:
    """Each member in turn."""
    return MEMBERS[request.param]


@pytest.fixture
def model(member: Member) -> PreTrainedModel:
    """Its model."""
    return model_of(member.name)


def needs(member: Member, *abilities: str) -> None:
    """Skip where the untouched model cannot do this."""
    for ability in abilities:
        if ability in member.cannot:
            pytest.skip(f"{ability}: {member.cannot[ability]}")


def content(member: Member) -> list[list[object]]:
    """Rows of one sample each: an image, a video where there is one, two pieces where they can."""
    specs: list[list[object]] = [[5, "image", 7]]
    if "images" not in member.cannot:
        specs.append([3, "image", "image", 6])
    if member.video:
        specs.append([4, "video", 6])
        if not {"images", "mixed"} & member.cannot.keys():
            specs.append([4, "image", 3, "video", 6])
    return specs


def last_logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The logits at each row's last real token."""
    with torch.no_grad():
        logits = model(**inputs).logits
    last = inputs["attention_mask"].long().cumsum(-1).argmax(-1)
    return logits[torch.arange(len(logits)), last]


def generated(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    """The greedy tokens after the prompt."""
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


def test_name_is_the_key(member: Member) -> None:
    assert MEMBERS[member.name] is member


def test_visual_tokens_are_typed_and_filled(member: Member, model: PreTrainedModel) -> None:
    for spec in content(member):
        row = make_rows(member, model, [spec])[0]
        assert len(row.ids) == len(row.types)
        assert any(row.types)
        assert max(row.types) == (2 if spec[-2] == "video" else 1)


@pytest.mark.fast_cases(4)
def test_attention_implementations_agree(member: Member, model: PreTrainedModel) -> None:
    needs(member, "sdpa")
    before = model.config._attn_implementation
    for spec in content(member):
        inputs = make_batch(member, model, [spec])
        logits = []
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            logits.append(last_logits(model, inputs))
        model.set_attn_implementation(before)
        assert torch.isfinite(logits[0]).all()
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_image_matters(member: Member, model: PreTrainedModel) -> None:
    one, other = (make_batch(member, model, [[5, "image", 7]]) for _ in range(2))
    other = {name: tensor.neg() if tensor.is_floating_point() else tensor for name, tensor in other.items()}
    assert (last_logits(model, one) - last_logits(model, other)).abs().max() > 1e-3


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(member: Member, model: PreTrainedModel, side: str) -> None:
    needs(member, "batch", f"{side}_padding")
    specs = SPECS[:2] if "images" in member.cannot else SPECS
    rows = make_rows(member, model, specs)
    together = last_logits(model, collate(member, model, rows, side))
    alone = torch.cat([last_logits(model, collate(member, model, [row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.fast_cases(4)
def test_cached_equals_uncached(member: Member, model: PreTrainedModel) -> None:
    needs(member, "generate", "use_cache")
    for spec in content(member):
        inputs = make_batch(member, model, [spec])
        assert torch.equal(generated(model, inputs), generated(model, inputs, use_cache=False))


@pytest.mark.fast_cases(4)
def test_batch_generates_what_singles_do(member: Member, model: PreTrainedModel) -> None:
    needs(member, "generate", "batch", "left_padding")
    rows = make_rows(member, model, SPECS[:2])
    together = generated(model, collate(member, model, rows))
    alone = torch.cat([generated(model, collate(member, model, [row])) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.fast_cases(4)
def test_no_special_id_is_generated(member: Member, model: PreTrainedModel) -> None:
    needs(member, "generate")
    tokens = model.generate(**make_batch(member, model, [[5, "image", 7]]), max_new_tokens=12, do_sample=False)
    assert tokens[0, -12:].max() < 150


def test_static_cache_generates_the_same(member: Member, model: PreTrainedModel) -> None:
    needs(member, "generate", "static_cache")
    inputs = make_batch(member, model, [[5, "image", 7]])
    static = generated(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generated(model, inputs))


def test_beams_run(member: Member, model: PreTrainedModel) -> None:
    needs(member, "generate", "beams")
    inputs = make_batch(member, model, [[5, "image", 7]])
    assert generated(model, inputs, num_beams=2).shape == (1, NEW_TOKENS)


@pytest.mark.fast_cases(4)
def test_second_turn_equals_the_long_prompt(member: Member, model: PreTrainedModel) -> None:
    needs(member, "generate", "second_turn")
    row = make_rows(member, model, [[5, "image", 7]])[0]
    first = model.generate(
        **collate(member, model, [row]), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    more = [*first.sequences[0, len(row.ids) :].tolist(), 9, 8, 7, 6]
    longer = Row(row.ids + more, row.types + [0] * len(more), row.labels + [IGNORED] * len(more), row.pieces)
    whole = collate(member, model, [longer])
    per_token = {name: tensor for name, tensor in whole.items() if tensor.shape == whole["input_ids"].shape}
    second = generated(model, per_token, **cache_argument(output_cache(first)))
    assert torch.equal(second, generated(model, whole))


def trained(model: PreTrainedModel, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of the text model's matrices."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model.eval()
    return loss.detach(), gradients


def test_loss_is_finite(member: Member, model: PreTrainedModel) -> None:
    needs(member, "training")
    loss, gradients = trained(model, make_batch(member, model, [[5, "image", 7, Answer(6)]], labels=True))
    assert torch.isfinite(loss)
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.fast_cases(4)
def test_checkpointing_changes_nothing(member: Member, model: PreTrainedModel) -> None:
    needs(member, "training", "checkpointing")
    inputs = make_batch(member, model, [[5, "image", 7, Answer(6)]], labels=True)
    plain_loss, plain = trained(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = trained(model, inputs)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradients, plain, atol=1e-5, rtol=1e-4)
