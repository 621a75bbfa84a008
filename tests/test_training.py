"""Training held against the slow reference: the loss and every gradient, for every kind of batch and trainer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reference
from checks import COMPACT, HALVES, LAST, UNEVEN, check_trace, method_of
from pyramiddrop import PyramidDrop, RandomDrop, UniformDrop
from pyramiddrop.hf.rows import take_next_labels
from reference import Rule
from tiny import IMAGE_TOKEN, IMPLEMENTATIONS, Answer, make_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about its own new names

TURNS = [3, "image", 4, Answer(3), 5, Answer(2)]
SAMPLES: dict[str, list] = {
    "one turn": [[5, "image", 7, Answer(4)]],
    "several turns": [[2, "image", 4, Answer(3), 2, "image", 1, Answer(2), 3, Answer(1)], TURNS],
    "mixed": [TURNS, [4, Answer(3)], [2, "image", 3], [9]],  # text only; an image but no label; neither
    "answer after the image": [["image", Answer(3)], [2, "image", Answer(1), 3, Answer(2)]],
    "answers after each image": [[2, "image", Answer(1), "image", Answer(2), "image", Answer(1)]],
    "answer first": [[Answer(2), "image", 3, Answer(2)], [Answer(4), "image"]],
    "long text": [TURNS, [40, Answer(5)]],
}
RULES = {"original": HALVES, "compact": COMPACT, "uneven": UNEVEN, "last": LAST}


def double(model: PreTrainedModel) -> PreTrainedModel:
    return model.double().train()


def training_batch(model: PreTrainedModel, specs: list, side: str = "right") -> dict[str, Tensor]:
    """A batch in the model's precision."""
    inputs = make_batch(model.to(torch.float32), specs, side, labels=True)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    double(model)
    return inputs


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient, within 1e-5 of the parameter's largest (norms and softmax run in fp32 even in an fp64 model)."""
    noise = 1e-7 * max(float(gradient.abs().max()) for gradient in expected.values())
    moved = {name for name, gradient in expected.items() if gradient.any()}
    assert moved <= ours.keys() <= expected.keys()
    for name, gradient in ours.items():
        tolerance = 1e-5 * float(expected[name].abs().max()) + noise
        torch.testing.assert_close(gradient, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def check_training(model: PreTrainedModel, rule: Rule, inputs: dict[str, Tensor], **changes: Any) -> Any:
    expected = reference.train(model, rule, inputs)
    expected_gradients = gradients(model, expected.loss)
    with method_of(rule, **changes)(model) as trace:
        output = model(**inputs)
        ours = gradients(model, output.loss)  # inside the block: checkpointing computes again in backward
    check_trace(trace, expected, rule)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(ours, expected_gradients)
    return output


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("specs", SAMPLES)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_loss_and_every_gradient(attention: str, specs: str) -> None:
    model = tiny_model("llava-gqa", attention)
    check_training(model, HALVES, training_batch(model, SAMPLES[specs]))


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("rule", ["compact", "uneven", "last"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_other_rules(attention: str, rule: str) -> None:
    model = tiny_model("llava", attention)
    check_training(model, RULES[rule], training_batch(model, SAMPLES["several turns"]))
    side = (
        "left" if attention == "sdpa" else "right"
    )  # eager in fp64: the untouched model, too, is NaN with left padding
    check_training(model, RULES[rule], training_batch(model, SAMPLES["mixed"], side))


def test_llava_next() -> None:
    model = tiny_model("next")
    check_training(model, HALVES, training_batch(model, SAMPLES["mixed"]))


def test_dropping_changes_the_gradients() -> None:
    """The test above would prove nothing if the dropped tokens did not matter."""
    model = tiny_model()
    inputs = training_batch(model, [TURNS])
    vanilla = gradients(model, model(**inputs).loss)
    dropped = gradients(model, reference.train(model, HALVES, inputs).loss)
    name = "model.language_model.layers.5.self_attn.v_proj.weight"
    assert (vanilla[name] - dropped[name]).abs().max() > 1e-2 * vanilla[name].abs().max()


def test_labels_count_in_eval_mode_too() -> None:
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["several turns"])
    model.eval()
    expected = reference.train(model, HALVES, inputs)
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        output = model(**inputs)
    check_trace(trace, expected, HALVES)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)


# --- Which tokens ask, and which must stay --------------------------------------------------------------------------


def test_a_sample_without_a_label_drops_nothing() -> None:
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["mixed"])
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**inputs)
    assert [[len(columns) for columns in stage.kept] for stage in trace.stages] == [
        [8, 0, 16, 0],
        [4, 0, 16, 0],
        [2, 0, 16, 0],
    ]


def test_the_token_that_predicts_an_answer_is_never_dropped() -> None:
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["answers after each image"])
    last_of_image = [2 + 15, 2 + 16 + 1 + 15, 2 + 16 + 1 + 16 + 2 + 15]
    rule = Rule([2, 4], [0.05, 0.01])  # quotas of 2 and 1 for 48 tokens, of which 3 predict an answer
    check_training(model, rule, inputs)
    with torch.no_grad(), method_of(rule)(model) as trace:
        model(**inputs)
    assert [stage.kept[0].tolist() for stage in trace.stages] == [last_of_image, last_of_image]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_labels_on_the_visual_tokens_themselves(attention: str) -> None:
    """They neither ask nor protect, and are not scored: all is as if they were -100."""
    model = tiny_model("llava", attention)
    inputs = training_batch(model, [[3, "image", 4, Answer(2)]])
    with method_of(HALVES)(model) as trace:
        clean = model(**inputs)
        expected = trace.stages[-1].kept[0].tolist()
        inputs["labels"][0, 6:9] = torch.tensor([5, 6, 7])
        with pytest.warns(UserWarning, match="ignores labels of visual tokens"):
            labelled = model(**inputs)
    assert torch.equal(labelled.loss, clean.loss)
    assert trace.stages[-1].kept[0].tolist() == expected
    check_training(model, HALVES, inputs)


def test_a_label_in_the_first_column_asks_nothing() -> None:
    """Nothing stands before it: its query must not wrap round to the last column."""
    model = tiny_model()
    inputs = training_batch(model, [[Answer(3), "image", 4]])
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**inputs)
    assert [len(stage.kept[0]) for stage in trace.stages] == [16, 16, 16]


def test_a_query_mask_overrides_the_labels() -> None:
    model = tiny_model()
    inputs = training_batch(model, [TURNS, TURNS])
    asked = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    asked[0, 20], asked[0, 22], asked[1, 4] = True, True, True  # column 4 is inside the image: it stays
    expected = reference.train(model, HALVES, inputs, queries=[[20, 22], [4]])
    expected_gradients = gradients(model, expected.loss)
    with method_of(HALVES)(model, query_mask=asked) as trace:
        loss = model(**inputs).loss
        ours = gradients(model, loss)
    check_trace(trace, expected, HALVES)
    assert 4 in trace.stages[-1].kept[1]
    assert_same_gradients(ours, expected_gradients)


@pytest.mark.parametrize("shape", [(2, 5), (3, 33), (33,)])
def test_a_query_mask_of_a_wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    model = tiny_model()
    inputs = make_batch(model, [TURNS, TURNS], labels=True)
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="query_mask"), method_of(HALVES)(model, query_mask=mask):
        model(**inputs)


def test_training_without_labels_drops_nothing_and_warns() -> None:
    model = tiny_model().train()
    inputs = make_batch(model, [TURNS, [9]], "right")
    vanilla = model(**inputs).logits
    with method_of(HALVES)(model), pytest.warns(UserWarning, match="labels"):
        patched = model(**inputs).logits
    assert torch.equal(patched, vanilla)


def test_nothing_is_warned_about_without_reason() -> None:
    model = tiny_model().train()
    inputs = make_batch(model, [TURNS, [9]], "right", labels=True)
    with method_of(HALVES)(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs).loss.backward()
        model(**make_batch(model, [[9]]))
        model.eval()
        model(**make_batch(model, [TURNS]))


# --- The trainer's habits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_gradient_checkpointing(attention: str, reentrant: bool) -> None:
    model = tiny_model("llava", attention)
    inputs = training_batch(model, SAMPLES["several turns"])
    expected = reference.train(model, HALVES, inputs)
    expected_gradients = gradients(model, expected.loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with method_of(HALVES)(model) as trace:
        loss = model(**inputs).loss
        ours = gradients(model, loss)
    check_trace(trace, expected, HALVES)
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(ours, expected_gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_when_backward_comes_late(reentrant: bool) -> None:
    """Two batches forward, then backward for both: each replays its own decision."""
    model = tiny_model()
    one = training_batch(model, SAMPLES["several turns"])
    two = training_batch(model, SAMPLES["mixed"])
    expected = gradients(model, reference.train(model, HALVES, one).loss + reference.train(model, HALVES, two).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with method_of(HALVES)(model):
        loss = model(**one).loss + model(**two).loss
        ours = gradients(model, loss)
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays_a_random_decision(reentrant: bool) -> None:
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["several turns"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with RandomDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125], seed=None)(model) as trace:
        loss = model(**inputs).loss
        kept = [stage.kept for stage in trace.stages]
        ours = gradients(model, loss)
    model.gradient_checkpointing_disable()
    assert_same_gradients(ours, gradients(model, reference.train(model, HALVES, inputs, forced=kept).loss))


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("specs", ["several turns", "mixed", "long text", "answer after the image"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_kept_logits(attention: str, specs: str) -> None:
    model = tiny_model("llava", attention)
    inputs = training_batch(model, SAMPLES[specs])
    full = check_training(model, HALVES, inputs, logits="full")
    kept = check_training(model, HALVES, inputs, logits="kept")
    lengths = reference.train(model, HALVES, inputs).lengths
    assert full.logits.shape[1] == inputs["input_ids"].shape[1]
    assert kept.logits.shape[1] == lengths[-1]
    torch.testing.assert_close(kept.loss, full.loss, atol=1e-6, rtol=1e-6)


def test_by_default_logits_are_short_only_while_a_model_trains() -> None:
    model = tiny_model("llava")
    inputs = training_batch(model, SAMPLES["several turns"])
    lengths = reference.train(model, HALVES, inputs).lengths
    with method_of(HALVES)(model.train()):
        output = model(**inputs)
        assert output.logits.shape[1] == lengths[-1]
        with torch.no_grad():
            full = model(**inputs)
        assert full.logits.shape[1] == lengths[0]
        model.eval()
        assert model(**inputs).logits.shape[1] == lengths[0]
    torch.testing.assert_close(output.loss, full.loss, atol=1e-6, rtol=1e-6)


def test_by_default_a_model_that_takes_its_own_loss_sees_all_logits() -> None:
    class Own(type(tiny_model("llava"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
            logits = super().forward(input_ids, labels=labels, **kwargs).logits
            return reference.next_token_loss(logits, labels)

    model = tiny_model("llava").train()
    inputs = training_batch(model, SAMPLES["several turns"])
    model.__class__ = Own
    with method_of(HALVES, logits="full")(model):
        expected = model(**inputs)
    with method_of(HALVES)(model):
        torch.testing.assert_close(model(**inputs), expected)


def test_rows_that_are_left_predict_what_stood_behind_them_and_filler_nothing() -> None:
    labels = torch.tensor([[-100, 5, 6, 7], [1, 2, 3, 4]])
    rows = torch.tensor([[0, 1, 3], [0, 1, 2]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    assert take_next_labels(labels, rows, valid).tolist() == [[5, 6, -100], [-100, 3, 4]]


@pytest.mark.parametrize("logits", ["full", "kept"])
def test_a_trainer_that_accumulates(logits: str) -> None:
    """The Trainer gives the number of supervised tokens of all accumulated batches: the loss is the sum over it."""
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["several turns"])
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    expected = reference.train(model, HALVES, inputs)
    with torch.no_grad(), method_of(HALVES, logits=logits)(model):
        loss = model(**inputs, num_items_in_batch=torch.tensor(4 * supervised)).loss
    torch.testing.assert_close(loss, expected.loss / 4, atol=1e-6, rtol=1e-6)


def test_full_logits_stand_where_the_caller_expects_them() -> None:
    """A trainer's own loss on the logits, without the model's, gives the same."""
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["several turns"])
    with method_of(HALVES, logits="full")(model):
        output = model(**inputs)
    own = reference.next_token_loss(output.logits, inputs["labels"])
    torch.testing.assert_close(own, output.loss, atol=1e-6, rtol=1e-6)


def test_embeddings_with_labels() -> None:
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["several turns"])
    embeds = reference.embed(model, **{k: v for k, v in inputs.items() if k != "labels"}).detach().requires_grad_()
    case = reference.training_case(model, inputs)
    case.embeds = embeds
    result = reference.run(model, HALVES, case)
    reference.next_token_loss(result.logits, inputs["labels"]).backward()
    expected, embeds.grad = embeds.grad, None
    with method_of(HALVES)(model, visual_mask=inputs["input_ids"] == IMAGE_TOKEN) as trace:
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss.backward()
    check_trace(trace, result, HALVES)
    torch.testing.assert_close(embeds.grad, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_lora(positions: str) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llava-gqa")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config)
    inputs = training_batch(base, SAMPLES["several turns"])
    model.train()
    rule = Rule(HALVES.layers, HALVES.keep, positions)
    expected = reference.train(base, rule, inputs)
    expected_gradients = gradients(model, expected.loss)
    assert any(gradient.any() for gradient in expected_gradients.values())
    for target in (model, base):  # whichever of the two is at hand
        with method_of(rule)(target) as trace:
            loss = model(**inputs).loss
            ours = gradients(model, loss)
        check_trace(trace, expected, rule)
        torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-6)
        assert_same_gradients(ours, expected_gradients)


def test_ranking_is_not_noisy() -> None:
    """LoRA's dropout is for the forward pass: the decision has none, and does not move the random state."""
    peft = pytest.importorskip("peft")
    base = tiny_model("llava")
    inputs = make_batch(base, SAMPLES["several turns"], "right", labels=True)
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model\.layers\.4\.self_attn\.[qk]_proj",
        lora_dropout=0.5,
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config)
    rule = Rule([4], [0.5])
    expected = reference.train(base.eval(), rule, inputs)
    model.train()
    with torch.no_grad():
        noisy = reference.train(base, rule, inputs)
    assert any(not torch.equal(a, b) for a, b in zip(noisy.kept[0], expected.kept[0], strict=True))
    states = []
    for method in (method_of(rule), UniformDrop(layers=[4], keep=[0.5])):  # the second one ranks by nothing
        torch.manual_seed(5)
        with torch.no_grad(), method(model) as trace:
            model(**inputs)
        states.append(torch.random.get_rng_state())
        if isinstance(method, PyramidDrop):
            check_trace(trace, expected, rule)
    assert torch.equal(*states)


def test_training_then_inference_then_training() -> None:
    """One patched model serves both in turns: nothing of the one call reaches the next."""
    model = tiny_model()
    inputs = training_batch(model, SAMPLES["several turns"])
    prompt = {"input_ids": inputs["input_ids"][1:, :23], "pixel_values": inputs["pixel_values"][2:]}
    expected_loss = reference.train(model, HALVES, inputs).loss
    expected_tokens = torch.stack(reference.greedy(model, HALVES, prompt, steps=3).tokens, dim=1)
    with method_of(HALVES)(model):
        for _ in range(2):
            torch.testing.assert_close(model.train()(**inputs).loss, expected_loss, atol=1e-6, rtol=1e-6)
            tokens = model.eval().generate(**prompt, max_new_tokens=3, do_sample=False)[:, -3:]
            assert tokens.tolist() == expected_tokens.tolist()
