"""The masked oracle by itself: it agrees with the older reference, and on every family with the untouched model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import reference
from checks import CLOSE, generated, same_gradients, stacked
from conformance.expected import learn, oracle_forward
from conformance.setups import FAST, setup_of
from conformance.subject import Batch, Subject, subject_of
from masked_oracle import eager, masked
from reference import Rule
from zoo import MEMBERS

RULES = {
    "next": Rule([2, 4, 6], [0.5, 0.25, 0.125]),
    "last": Rule([2, 4, 6], [0.5, 0.25, 0.125], rank_layer="last"),
    "uneven": Rule([1, 2, 7], [0.7, 0.3, 0.3]),
    "per image": Rule([2, 4, 6], [0.5, 0.25, 0.125], per_image=True),
}
EVERY = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name, member in MEMBERS.items()
    if not setup_of(member).hopeless
]


def check_against(result: reference.Result, oracle: Any, logits: torch.Tensor) -> None:
    assert [[c.tolist() for c in kept] for kept in oracle.kept] == [[c.tolist() for c in kept] for kept in result.kept]
    assert torch.equal(oracle.survives, result.alive[-1] | ~result.alive[0])
    alive = result.alive[-1]
    torch.testing.assert_close(logits[alive], result.logits[alive], **CLOSE)


# --- The older reference, written from scratch for LLaVA alone -------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_prefill_is_the_reference(rule: str) -> None:
    subject = subject_of(MEMBERS["llava"])
    batch = subject.batch(subject.mixed)
    with masked(subject.model, RULES[rule], batch.prompt) as oracle:
        logits = subject.model(**batch.inputs).logits
    check_against(reference.prefill(subject.model, RULES[rule], batch.inputs), oracle, logits)


@pytest.mark.parametrize("rule", RULES)
def test_training_is_the_reference(rule: str) -> None:
    subject = subject_of(MEMBERS["llava"])
    subject.model.train()
    batch = subject.batch(subject.lessons[-1], "right", labels=True)
    with masked(subject.model, RULES[rule], batch.prompt) as oracle:
        loss, gradients = learn(subject.model, batch, use_cache=False)
    result = reference.train(subject.model, RULES[rule], batch.inputs)
    assert result.loss is not None
    check_against(result, oracle, result.logits)
    torch.testing.assert_close(loss, result.loss.detach())
    result.loss.backward()
    same_gradients(gradients, {n: p.grad for n, p in subject.model.named_parameters() if p.grad is not None})


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_generation_is_the_reference(rule: str, use_cache: bool) -> None:
    subject = subject_of(MEMBERS["llava"])
    batch = subject.batch(subject.mixed)
    with masked(subject.model, RULES[rule], batch.prompt) as oracle:
        output = generated(subject.model, batch.inputs, 4, use_cache=use_cache)
    talk = reference.greedy(subject.model, RULES[rule], batch.inputs, 4)
    assert output.sequences[:, -4:].tolist() == stacked(talk.tokens)
    for logits, wanted in zip(output.logits, talk.logits, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)
    assert talk.first is not None
    assert [[c.tolist() for c in kept] for kept in oracle.kept] == [
        [c.tolist() for c in kept] for kept in talk.first.kept
    ]


# --- Every family ---------------------------------------------------------------------------------------------------


def logits_of(subject: Subject, rule: Rule, batch: Batch) -> torch.Tensor:
    """The oracle's logits: masked, or with rows removed where masking is none."""
    return oracle_forward(subject, rule, batch).logits


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_keeping_all_is_the_untouched_model(name: str) -> None:
    subject = subject_of(MEMBERS[name])
    for specs in subject.prompts:
        batch = subject.batch(specs)
        with eager(subject.model):
            vanilla = subject.model(**batch.inputs).logits
        rule = Rule(subject.setup.layers, [1.0] * len(subject.setup.layers))
        with masked(subject.model, rule, batch.prompt):
            assert torch.equal(subject.model(**batch.inputs).logits, vanilla)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("name", EVERY)
def test_dropping_matters(name: str) -> None:
    """Each stage changes what comes out: otherwise no comparison with the oracle would say anything."""
    subject = subject_of(MEMBERS[name])
    batch = subject.batch([[5, "image", 7]])
    layers, keep = subject.setup.rule().layers, subject.setup.rule().keep
    outputs = [logits_of(subject, Rule(layers[:stages], keep[:stages]), batch) for stages in range(len(layers) + 1)]
    for fewer, more in pairwise(outputs):
        assert (fewer[0, -1] - more[0, -1]).abs().max() > 1e-4


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_its_rows(name: str) -> None:
    subject, rule = subject_of(MEMBERS[name]), subject_of(MEMBERS[name]).setup.rule()
    for side in ("left", "right"):
        if subject.can("batch") and subject.can(f"{side}_padding"):
            batch = subject.batch(subject.mixed, side)
            together = logits_of(subject, rule, batch)
            for number, single in enumerate(subject.apart(batch)):
                last = int(batch.valid[number].nonzero()[-1])
                torch.testing.assert_close(together[number, last], logits_of(subject, rule, single)[0, -1], **CLOSE)
