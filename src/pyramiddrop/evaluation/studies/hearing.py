"""Owns what a model says to a batch of samples: its greedy answers, and the logits of their first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyramiddrop.evaluation.matching import Match
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.studies.likeness import divergence, same_choice
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint

#: What is scored without answers, against the full model: whole answers, the likeliest next token, its distribution.
LABEL_FREE = ("agreement", "top1", "kl")


@dataclass(frozen=True)
class Heard:
    """What a model said to a batch: its answers, and the logits (B, V) of their first token, in float32."""

    texts: list[str]
    logits: Tensor

    def against(self, full: Heard) -> dict[str, list[float]]:
        """The label-free scores of each sample, where the full model said `full`."""
        return {
            "agreement": [float(one == other) for one, other in zip(full.texts, self.texts, strict=True)],
            "top1": same_choice(full.logits, self.logits).double().tolist(),
            "kl": divergence(full.logits, self.logits).tolist(),
        }


def hear(checkpoint: Checkpoint, inputs: Mapping[str, Any], max_new_tokens: int) -> Heard:
    """Let the model answer a batch of left-padded prompts, under whatever method is on it."""
    found: list[Tensor] = []

    def keep_first(module: Any, args: Any, output: Any) -> None:
        if not found:
            found.append(output.logits[:, -1].float())

    handle = checkpoint.model.register_forward_hook(keep_first)
    try:
        texts = answer_greedily(checkpoint, inputs, max_new_tokens)
    finally:
        handle.remove()
    return Heard(texts, found[0])


def scored(match: Match, samples: Sequence[Sample], texts: Sequence[str]) -> list[float | None]:
    """What each answer scores; None where no right answer is known."""
    pairs = zip(samples, texts, strict=True)
    return [match(text, sample.answers) if sample.answers else None for sample, text in pairs]
