"""The library held against the masked oracle: one forward pass, one generation, one step of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checks import CLOSE, generated, method_of, same_gradients
from conformance.expected import Spoken, learn, oracle_forward, oracle_generation, oracle_training
from conformance.subject import Batch, Subject
from pyramiddrop.methods import Method
from reference import Rule


def same_forward(subject: Subject, rule: Rule, batch: Batch, method: Method | None = None) -> None:
    """The kept sets, and the logits of every token that survives."""
    expected = oracle_forward(subject, rule, batch)
    with torch.no_grad(), (method or method_of(rule))(subject.model) as trace:
        logits = subject.model(**batch.inputs).logits
    same_kept(trace, expected.kept)
    for ours, wanted, alive in zip(logits, expected.logits, expected.alive & batch.valid, strict=True):
        torch.testing.assert_close(ours[alive], wanted[alive], **CLOSE)


def same_kept(trace: Any, expected: list[list[Tensor]]) -> None:
    """Each stage keeps the same columns; and it does drop, or the comparison would say nothing."""
    assert [[columns.tolist() for columns in stage.kept] for stage in trace.stages] == [
        [columns.tolist() for columns in kept] for kept in expected
    ]
    assert any(len(kept) < len(all_) for kept, all_ in zip(expected[-1], trace.visual_columns, strict=True))


def same_generation(
    subject: Subject, rule: Rule, batch: Batch, steps: int = 4, ours: Any = None, **options: Any
) -> None:
    """Tokens and what they were chosen from. `options` hold for both sides, `ours` for the library's alone."""
    expected = oracle_generation(subject, rule, batch, steps, options)
    with method_of(rule)(subject.model) as trace:
        output = generated(subject.model, batch.inputs, steps, **options | (ours or {}))
    same_kept(trace, expected.kept)
    same_output(output, expected)


def same_output(output: Any, expected: Spoken) -> None:
    """An output of `generate` is the oracle's, within rounding."""
    assert output.sequences[:, -len(output.logits) :].tolist() == expected.tokens.tolist()
    for logits, wanted in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)
    if expected.scores is not None:
        torch.testing.assert_close(output.sequences_scores, expected.scores, **CLOSE)


def same_training(subject: Subject, rule: Rule, batch: Batch, checkpointing: Any = None) -> None:
    """The loss, the kept sets and every gradient."""
    model = subject.model.train()
    expected, expected_gradients, kept = oracle_training(subject, rule, batch)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    with method_of(rule)(model) as trace:
        loss, gradients = learn(model, batch)
    same_kept(trace, kept)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    same_gradients(gradients, expected_gradients)
