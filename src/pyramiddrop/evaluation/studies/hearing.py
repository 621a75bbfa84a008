"""Owns what a model says to a batch of samples: its greedy answers, and the logits of their first token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyramiddrop.evaluation.studies.likeness import divergence, same_choice
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint


@dataclass(frozen=True)
class Heard:
    """What a model said to a batch: its answers, and the logits (B, V) of their first token, in float32."""

    texts: list[str]
    logits: Tensor

    def next_token(self, full: Heard) -> dict[str, list[float]]:
        """How like its next token is to that of the full model, which said `full`, for each sample."""
        return {
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
