"""The judge judged: the slow reference against the untouched model and against the official code's numbers."""

from __future__ import annotations

import pytest
import torch

import reference
from official import official_model, recorded
from reference import Case, Rule, Turn
from tiny import FAMILIES, Answer, make_batch, tiny_model

KEEP_ALL = Rule([2, 4, 6], [1.0, 1.0, 1.0])
HALVES = Rule([2, 4, 6], [0.5, 0.25, 0.125])


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_vanilla_model(family: str, side: str) -> None:
    model = tiny_model(family)
    inputs = make_batch(model, [[5, "image", 7], [3, "image", 2, "image", 1], [9]], side)
    result = reference.prefill(model, KEEP_ALL, inputs)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(result.logits[valid], model(**inputs).logits[valid], atol=2e-5, rtol=1e-4)


def test_keeping_all_trains_as_the_vanilla_model() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7, Answer(3), 2, Answer(4)], [3, Answer(2)]], "right", labels=True)
    torch.testing.assert_close(reference.train(model, KEEP_ALL, inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_dropping_is_seen_by_the_last_token_of_samples_with_an_image_only(positions: str) -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7], [20]])
    rule = Rule(HALVES.layers, HALVES.keep, positions)
    dropped, full = (reference.prefill(model, r, inputs).logits[:, -1] for r in (rule, KEEP_ALL))
    assert (dropped[0] - full[0]).abs().max() > 1e-2
    torch.testing.assert_close(dropped[1], full[1], atol=2e-5, rtol=1e-4)


def test_greedy_with_all_kept_is_vanilla_generate() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7], [9]])
    talk = reference.greedy(model, KEEP_ALL, inputs, steps=5)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
    assert torch.stack(talk.tokens, dim=1).tolist() == tokens.tolist()


def test_official_inference() -> None:
    case = recorded("a_single_image")
    model = official_model("a_single_image")
    embeds = case["inputs_embeds"]
    length = embeds.shape[1]
    valid = torch.ones(1, length, dtype=torch.bool)
    talk = reference.Talk(Case(embeds, valid, case.visual_mask(), [Turn(0, length, [[length - 1]])]))
    with torch.no_grad():
        talk = reference.answer(model, case.rule, talk, steps=12)
    assert talk.first is not None
    for stage in range(3):
        assert talk.first.kept[stage][0].tolist() == case.kept(stage, 0)
        # The recorded scores are of the visual tokens that were still alive, in order.
        before = case.kept(stage - 1, 0) if stage else case.visual_mask()[0].nonzero()[:, 0].tolist()
        scores = talk.first.scores[stage][0][before]
        torch.testing.assert_close(scores, case[f"stage{stage}_s0_scores"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(talk.first.logits[talk.first.alive[-1]], case["logits"][0], atol=3e-4, rtol=0)
    assert torch.stack(talk.tokens, dim=1)[0].tolist() == case["gen_tokens"].tolist()
    torch.testing.assert_close(torch.stack(talk.logits, dim=1)[0], case["gen_logits"], atol=3e-4, rtol=0)


def test_official_training() -> None:
    case = recorded("d_train_padded")
    model = official_model("d_train_padded")
    embeds = case["inputs_embeds"].requires_grad_()
    labels, valid, visual = case["labels"], case["attention_mask"], case.visual_mask()
    queries = reference.answer_queries(labels)
    protected = visual & reference.predictors(labels)
    result = reference.run(model, case.rule, Case(embeds, valid, visual, [Turn(0, 71, queries)], protected=protected))
    for stage in range(3):
        for sample in range(2):
            assert result.kept[stage][sample].tolist() == case.kept(stage, sample)
    logits = torch.cat([row[alive] for row, alive in zip(result.logits, result.alive[-1], strict=True)])
    torch.testing.assert_close(logits, case["logits"][case["final_mask"]], atol=3e-4, rtol=0)
    loss = reference.next_token_loss(result.logits, labels)
    assert abs(loss.item() - case.loss) < 1e-4
    loss.backward()
    expected = case["grad_inputs_embeds"]
    assert (embeds.grad - expected).abs().max() < 1e-3 * expected.abs().max()
