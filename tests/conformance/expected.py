"""What must come out: the masked oracle on a batch, or, where masking is no oracle, rows taken out sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from checks import generated
from conformance.subject import Batch, Subject
from masked_oracle import Oracle, masked
from reference import IGNORED, Rule
from removed_rows_oracle import removed

Kept = list[list[Tensor]]  # per stage, per row: sorted visual columns


@dataclass
class Seen:
    """A forward: (B, L, V) logits, meaningless where `alive` is False, and the kept sets."""

    logits: Tensor
    alive: Tensor
    kept: Kept


@dataclass
class Spoken:
    """A generation: new tokens (rows, steps), what they were chosen from at each step, scores of beams, kept sets."""

    tokens: Tensor
    logits: list[Tensor]
    scores: Tensor | None
    kept: Kept


def oracle_forward(subject: Subject, rule: Rule, batch: Batch) -> Seen:
    """The prompt's forward."""
    with torch.no_grad():
        if not subject.setup.removed:
            with masked(subject.model, rule, batch.prompt) as oracle:
                return Seen(subject.model(**batch.inputs, use_cache=False).logits, oracle.survives, oracle.kept)
        rows = []
        for single in subject.apart(batch):
            with removed(subject.model, rule, single.prompt) as oracle:
                rows.append(Seen(subject.model(**single.inputs, use_cache=False).logits, oracle.survives, oracle.kept))
    width = batch.valid.shape[1]
    logits = torch.zeros(len(rows), width, rows[0].logits.shape[2])
    alive = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        logits[number, batch.valid[number]], alive[number, batch.valid[number]] = row.logits[0], row.alive[0]
    return Seen(logits, alive, joined([row.kept for row in rows], batch))


def oracle_generation(subject: Subject, rule: Rule, batch: Batch, steps: int, options: Any) -> Spoken:
    """`generate` with these options."""
    if not subject.setup.removed:
        with masked(subject.model, rule, batch.prompt) as oracle:
            return spoken(generated(subject.model, batch.inputs, steps, **options), oracle)
    rows = []
    for single in subject.apart(batch):
        with removed(subject.model, rule, single.prompt) as oracle:
            output = generated(subject.model, single.inputs, steps, **options | {"use_cache": False})
            rows.append(spoken(output, oracle))
    scores = [row.scores for row in rows if row.scores is not None]
    return Spoken(
        torch.cat([row.tokens for row in rows]),
        [torch.cat(step) for step in zip(*(row.logits for row in rows), strict=True)],
        torch.cat(scores) if scores else None,
        joined([row.kept for row in rows], batch),
    )


def spoken(output: Any, oracle: Oracle) -> Spoken:
    """The generation of an oracle."""
    tokens = output.sequences[:, -len(output.logits) :]
    return Spoken(tokens, list(output.logits), output.get("sequences_scores"), oracle.kept)


def joined(rows: Sequence[Kept], batch: Batch) -> Kept:
    """The kept sets of rows that ran alone, as columns of the batch."""
    starts = batch.valid.long().argmax(dim=1).tolist()
    return [
        [columns + start for row, start in zip(rows, starts, strict=True) for columns in row[stage]]
        for stage in range(len(rows[0]))
    ]


def oracle_training(subject: Subject, rule: Rule, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Kept]:
    """The loss, every gradient and the kept sets. Rows that run alone are weighed by their supervised tokens."""
    if not subject.setup.removed:
        with masked(subject.model, rule, batch.prompt) as oracle:
            return *learn(subject.model, batch, use_cache=False), oracle.kept
    kept, loss, gradients = [], torch.zeros(()), {}
    total = int((batch.inputs["labels"][:, 1:] != IGNORED).sum())
    for single in subject.apart(batch):
        share = int((single.inputs["labels"][:, 1:] != IGNORED).sum()) / total
        with removed(subject.model, rule, single.prompt) as oracle:
            own, found = learn(subject.model, single, use_cache=False)
        kept.append(oracle.kept)
        if share:
            loss = loss + share * own
            gradients = {name: gradients.get(name, 0) + share * gradient for name, gradient in found.items()} | {
                name: gradient for name, gradient in gradients.items() if name not in found
            }
    return loss, gradients, joined(kept, batch)


def learn(model: PreTrainedModel, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and the gradient of every parameter that has one."""
    torch.manual_seed(0)  # for dropout, where a family has some
    model.zero_grad()
    loss = model(**batch.inputs, **options).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients
