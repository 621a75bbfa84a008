"""The specification, `pyramiddrop.naive`: it has the official code's numbers, and the fast path has its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from checks import CLOSE, COMPACT, HALVES, LAST, UNEVEN, generated, kept_columns, method_of, new_tokens, same_gradients
from official import official_model, recorded
from pyramiddrop import naive
from reference import Rule
from tiny import FAMILIES, Answer, make_batch, text_model, tiny_model

RULES = {
    "original": HALVES,
    "compact": COMPACT,
    "last": LAST,
    "compact last": Rule([2, 4, 6], [0.5, 0.25, 0.125], "compact", "last"),
    "uneven": UNEVEN,
    "per image": Rule([2, 4, 6], [0.5, 0.25, 0.125], per_image=True),
}
PROMPTS = [[5, "image", 7], [3, "image", 2, "image", 1], [9], [2, "image"]]
LESSONS = [[2, "image", 4, Answer(3), 2, "image", 1, Answer(2)], ["image", Answer(3)], [2, "image", 3], [4, Answer(2)]]


def words(rule: Rule) -> dict[str, Any]:
    """The rule in the specification's words."""
    return {
        "layers": rule.layers,
        "keep": rule.keep,
        "positions": rule.positions,
        "rank_layer": rule.rank_layer,
    }


def as_prompt(model: Any, rule: Rule, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, and who is valid and visual."""
    case = reference.inference_case(model, {name: value for name, value in inputs.items() if name != "labels"})
    assert case.images is not None
    return case.embeds, case.valid, case.images if rule.per_image else case.visual


def columns(kept: list[Tensor]) -> list[list[list[int]]]:
    """By drop and sample, the columns that stay."""
    return [[row.nonzero()[:, 0].tolist() for row in stays] for stays in kept]


def columns_of(result: reference.Result) -> list[list[list[int]]]:
    """The same of the reference."""
    return [[row.tolist() for row in stays] for stays in result.kept]


def check_kept(trace: Any, kept: list[Tensor]) -> None:
    assert kept_columns(trace) == columns(kept)


# --- The official code ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_official_inference() -> None:
    case, model = recorded("a_single_image"), official_model("a_single_image")
    embeds, visual, rule = case["inputs_embeds"], case.visual_mask(), words(case.rule)
    valid = torch.ones_like(visual)
    hidden, kept = naive.forward(text_model(model), embeds, valid, visual, **rule)
    assert columns(kept) == [[case.kept(stage, 0)] for stage in range(3)]
    left = ~visual | kept[-1]
    torch.testing.assert_close(model.lm_head(hidden)[left], case["logits"][0], atol=3e-4, rtol=0)
    tokens = naive.generate(text_model(model), model.lm_head, embeds, valid, visual, 12, **rule)
    assert tokens[0].tolist() == case["gen_tokens"].tolist()


def test_official_training() -> None:
    case, model = recorded("d_train_padded"), official_model("d_train_padded")
    embeds, labels = case["inputs_embeds"].requires_grad_(), case["labels"]
    valid, visual = case["attention_mask"].bool(), case.visual_mask()
    hidden, kept = naive.forward(text_model(model), embeds, valid, visual, labels=labels, **words(case.rule))
    assert columns(kept) == [[case.kept(stage, sample) for sample in range(2)] for stage in range(3)]
    loss = reference.next_token_loss(model.lm_head(hidden), labels)
    assert case.loss is not None
    assert abs(loss.item() - case.loss) < 1e-4
    loss.backward()
    expected = case["grad_inputs_embeds"]
    assert (embeds.grad - expected).abs().max() < 1e-3 * expected.abs().max()


# --- The reference, which reads its scores off the attention module, and the fast path --------------------------------


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt(family: str, rule: str) -> None:
    model = tiny_model(family)
    inputs = make_batch(model, PROMPTS)
    embeds, valid, visual = as_prompt(model, RULES[rule], inputs)
    hidden, kept = naive.forward(text_model(model), embeds, valid, visual, **words(RULES[rule]))
    expected = reference.prefill(model, RULES[rule], inputs)
    assert columns(kept) == columns_of(expected)
    left = valid & ((visual == 0) | kept[-1])
    torch.testing.assert_close(model.lm_head(hidden)[left], expected.logits[left], **CLOSE)
    with method_of(RULES[rule])(model) as trace:
        logits = model(**inputs).logits
    check_kept(trace, kept)
    torch.testing.assert_close(logits[left], model.lm_head(hidden)[left], **CLOSE)


@pytest.mark.parametrize("rule", RULES)
def test_an_answer(rule: str) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, PROMPTS)
    prompt = as_prompt(model, RULES[rule], inputs)
    tokens = naive.generate(text_model(model), model.lm_head, *prompt, 6, **words(RULES[rule]))
    with method_of(RULES[rule])(model):
        assert new_tokens(generated(model, inputs, 6), inputs) == tokens.tolist()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_a_lesson(rule: str, side: str) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, LESSONS, side, labels=True)
    embeds, valid, visual = as_prompt(model, RULES[rule], inputs)
    hidden, kept = naive.forward(
        text_model(model), embeds, valid, visual, labels=inputs["labels"], **words(RULES[rule])
    )
    loss = reference.next_token_loss(model.lm_head(hidden), inputs["labels"])
    expected = gradients(model, loss)
    with method_of(RULES[rule])(model) as trace:
        output = model(**inputs)
    check_kept(trace, kept)
    torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=1e-5)
    same_gradients(gradients(model, output.loss), expected)
    assert columns(kept) == columns_of(reference.train(model, RULES[rule], inputs))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- Where the rules meet ---------------------------------------------------------------------------------------------


def test_an_answer_at_the_start_of_a_padded_row_is_asked_for_by_nobody() -> None:
    """The column before it is padding."""
    model = tiny_model()
    inputs = make_batch(model, [[Answer(2), "image", 3], [4, "image", 9, Answer(2)]], labels=True)
    prompt = as_prompt(model, HALVES, inputs)
    _, kept = naive.forward(text_model(model), *prompt, labels=inputs["labels"], **words(HALVES))
    with method_of(HALVES)(model) as trace:
        model(**inputs)
    check_kept(trace, kept)
    assert columns(kept) == columns_of(reference.train(model, HALVES, inputs))
    assert [len(row) for row in columns(kept)[-1]] == [16, 2]


def test_equal_scores_go_to_the_lower_column() -> None:
    alive = torch.ones(1, 8, dtype=torch.bool)
    visual, nobody = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]]), torch.zeros(1, 8, dtype=torch.bool)
    asks = naive.last_token(alive)
    scores = torch.tensor([[9.0, 1, 2, 1, 2, 1, 2, 9]])
    left = naive.drop(alive, scores, visual, asks, nobody, 0.7)  # floor(6 * 0.7) = 4
    assert left[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 6, 7]
    one = naive.drop(alive, scores, visual, asks, nobody, 0.01)
    assert one[0].nonzero()[:, 0].tolist() == [0, 2, 7]
