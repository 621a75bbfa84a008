"""The library held against the masked oracle: one forward pass, one generation, one step of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from checks import CLOSE, generated, method_of
from conformance.subject import Batch
from masked import Oracle, masked
from pyramiddrop.methods import Method
from reference import Rule


def same_forward(model: PreTrainedModel, rule: Rule, batch: Batch, method: Method | None = None) -> None:
    """The kept sets, and the logits of every token that survives."""
    with torch.no_grad(), masked(model, rule, batch.prompt) as oracle:
        expected = model(**batch.inputs, use_cache=False).logits
    with torch.no_grad(), (method or method_of(rule))(model) as trace:
        logits = model(**batch.inputs).logits
    same_kept(trace, oracle)
    alive = oracle.survives & batch.valid
    torch.testing.assert_close(logits[alive], expected[alive], **CLOSE)


def same_kept(trace: Any, oracle: Oracle) -> None:
    """Each stage keeps the same columns; and it does drop, or the comparison would say nothing."""
    assert [list(map(list, map(Tensor.tolist, stage.kept))) for stage in trace.stages] == [
        [columns.tolist() for columns in kept] for kept in oracle.kept
    ]
    assert any(len(kept) < len(all_) for kept, all_ in zip(oracle.kept[-1], trace.visual_columns, strict=True))


def same_generation(
    model: PreTrainedModel, rule: Rule, batch: Batch, steps: int = 4, ours: Any = None, **options: Any
) -> Any:
    """Tokens and what they were chosen from. `options` hold for both sides, `ours` for the library's alone."""
    with masked(model, rule, batch.prompt) as oracle:
        expected = generated(model, batch.inputs, steps, **options)
    with method_of(rule)(model) as trace:
        output = generated(model, batch.inputs, steps, **options | (ours or {}))
    same_kept(trace, oracle)
    same_output(output, expected)
    return output


def same_output(output: Any, expected: Any) -> None:
    """Two outputs of `generate` are the same, within rounding."""
    assert output.sequences.tolist() == expected.sequences.tolist()
    for logits, wanted in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)
    if output.get("sequences_scores") is not None:
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, **CLOSE)


def same_training(model: PreTrainedModel, rule: Rule, batch: Batch, checkpointing: Any = None) -> None:
    """The loss, the kept sets and every gradient."""
    model.train()
    with masked(model, rule, batch.prompt) as oracle:
        expected, expected_gradients = learn(model, batch, use_cache=False)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    with method_of(rule)(model) as trace:
        loss, gradients = learn(model, batch)
    same_kept(trace, oracle)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    same_gradients(gradients, expected_gradients)


def learn(model: PreTrainedModel, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and the gradient of every parameter that has one."""
    torch.manual_seed(0)  # for dropout, where a family has some
    model.zero_grad()
    loss = model(**batch.inputs, **options).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within rounding of each parameter's largest; a parameter that nobody used may have zeros or nothing."""
    noise = 1e-5 * max(float(gradient.abs().max()) for gradient in expected.values())
    moved = {name for name, gradient in expected.items() if gradient.any()}
    assert moved <= ours.keys()
    for name, gradient in ours.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        tolerance = 1e-3 * float(wanted.abs().max()) + noise
        torch.testing.assert_close(gradient, wanted, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
