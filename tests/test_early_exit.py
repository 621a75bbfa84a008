"""A last keep of 0 leaves no visual token to the later layers; held against the slow reference, which masks them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import reference
from checks import CLOSE, EXIT, check_logits, check_trace, generated, method_of, new_tokens, same_gradients, stacked
from pyramiddrop import FastV, PyramidDrop, RandomDrop
from pyramiddrop.cost import PRESETS, DropCounts, Prompt, estimate_cost, prefill_flops
from pyramiddrop.hf.versions import output_cache
from pyramiddrop.schedule import PreLLMSchedule, Schedule
from reference import Rule
from tiny import IMPLEMENTATIONS, Answer, collate, make_batch, make_rows, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:pyramiddrop ranks by visual tokens")

MIXED = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]
LESSONS = [[3, "image", 4, Answer(3), 2, Answer(2)], [4, Answer(3)], [2, "image", 3], ["image", Answer(2)]]
ALONE = Rule([3], [0.0])
RULES = {
    "exit": EXIT,
    "alone": ALONE,
    "compact": Rule([2, 4, 6], [0.5, 0.25, 0.0], positions="compact"),
    "last": Rule([2, 4], [0.5, 0.0], rank_layer="last", per_image=True),
}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_prefill(attention: str, rule: str) -> None:
    """One sample, and a padded batch with a sample that has no picture."""
    model = tiny_model("llava-gqa", attention)
    for specs, side in ([MIXED[0]], "left"), (MIXED, "left"), (MIXED, "right"):
        inputs = make_batch(model, specs, side)
        expected = reference.prefill(model, RULES[rule], inputs)
        with method_of(RULES[rule])(model) as trace:
            logits = model(**inputs).logits
        check_trace(trace, expected, RULES[rule])
        check_logits(logits, expected)
        assert [len(kept) for kept in trace.stages[-1].kept] == [0] * len(specs)
        assert trace.stages[-1].scores is None


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_mates(rule: str) -> None:
    model = tiny_model()
    rows = make_rows(model, MIXED)
    batch = collate(rows, "left")
    with method_of(RULES[rule])(model):
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(**collate([row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_generation(rule: str, options: dict[str, Any]) -> None:
    """The layers behind the exit hold text alone."""
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)
    expected = reference.greedy(model, RULES[rule], inputs, 4)
    with method_of(RULES[rule])(model):
        output = generated(model, inputs, 4, **options)
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    for logits, wanted in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)


@torch.no_grad()
def test_the_cache_holds_text_alone_behind_the_exit() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    with method_of(EXIT)(model) as trace:
        output = generated(model, inputs, 2)
    assert trace.lengths == [28, 28, 20, 20, 16, 16, 12, 12]
    assert [layer.keys.shape[-2] for layer in output_cache(output).layers] == [length + 1 for length in trace.lengths]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("rule", ["exit", "alone"])
@torch.no_grad()
def test_a_further_picture_on_top_of_the_cache(rule: str) -> None:
    model = tiny_model("llava-gqa")
    first, second = make_batch(model, [[5, "image", 7]]), make_batch(model, [[3, "image", 4]], seed=2)
    talk = reference.greedy(model, RULES[rule], first, 3)
    seen = list(talk.tokens)
    reference.further_turn(model, RULES[rule], talk, second, 3)
    with method_of(RULES[rule])(model) as trace:
        output = generated(model, first, 3)
        assert new_tokens(output, first) == stacked(seen)
        ids = torch.cat([output.sequences, second["input_ids"]], 1)
        further = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = generated(model, further, 3, past_key_values=output_cache(output))
    assert len(trace.stages[-1].kept[0]) == 0
    # The answer's last token is computed with the next prompt, where the reference computes it before.
    assert new_tokens(output, further) == stacked(talk.tokens[-3:])


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("logits", ["full", "kept"])
@pytest.mark.parametrize("rule", RULES)
def test_training(rule: str, logits: str) -> None:
    """Loss and gradients; a visual token that predicts an answer stays, for the loss is read off its row."""
    model = tiny_model("llava-gqa").train()
    inputs = make_batch(model, LESSONS, "right", labels=True)
    expected = reference.train(model, RULES[rule], inputs)
    wanted = gradients(model, expected.loss)
    with method_of(RULES[rule], logits=logits)(model) as trace:
        loss = model(**inputs).loss
        check_trace(trace, expected, RULES[rule])
        torch.testing.assert_close(loss, expected.loss, **CLOSE)
        same_gradients(gradients(model, loss), wanted)
    assert [len(kept) for kept in trace.stages[-1].kept] == [0, 0, 16, 1]  # the third asks nothing, and drops nothing


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"merge": True}, {"reserve": 0.5}, {"score": "variation"}], ids=str)
@torch.no_grad()
def test_an_exit_alone_ranks_and_merges_nothing(settings: dict[str, Any]) -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    expected = reference.prefill(model, ALONE, inputs)
    with method_of(ALONE, **settings)(model):
        check_logits(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", [FastV(layer=3, keep=0.0), RandomDrop(layers=[3], keep=[0])], ids=repr)
@torch.no_grad()
def test_other_methods_can_leave_early_too(method: Any) -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    with method(model) as trace:
        check_logits(model(**inputs).logits, reference.prefill(model, ALONE, inputs))
    assert [len(kept) for kept in trace.stages[0].kept] == [0, 0, 0]


@torch.no_grad()
def test_the_trace_and_the_cost_model_count_no_ranking_at_an_exit() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    with method_of(ALONE)(model) as trace:
        model(**inputs)
    shape, lengths = trace._shape, [28] * 3 + [12] * 5
    assert shape is not None
    assert trace.cost().flops == prefill_flops(shape, lengths)
    assert method_of(ALONE).ranking_flops(shape, DropCounts(3, 28, 16, 0)) == 0
    llava, schedule = PRESETS["llava-1.5-7b"], Schedule.of([8, 16], [0.5, 0.0])
    cost = estimate_cost(llava.shape, Prompt(576, 64), schedule)
    assert cost.visual_by_layer == (576,) * 8 + (288,) * 8 + (0,) * 16
    assert cost.full.ranking == estimate_cost(llava.shape, Prompt(576, 64), Schedule.of([8], [0.5])).full.ranking
    assert cost.kv_by_layer[-1] == 64 * 2 * 2 * 4096  # keys and values of 64 text tokens in 16 bits


def test_the_exit_travels_with_the_checkpoint(tmp_path: Any) -> None:
    method = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.0])
    method.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pyramiddrop.json").read_text())["keep"] == [0.5, 0.25, 0.0]
    assert PyramidDrop.from_pretrained(tmp_path) == method


def test_nothing_can_be_left_before_the_decoder() -> None:
    with pytest.raises(ValueError, match="keep must be above 0 before the decoder"):
        PreLLMSchedule.keeping(0.0)
