"""Next-token agreement between the pruned and the full model: KL divergence and top-1 match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint


@dataclass(frozen=True)
class Generation:
    """A model's answers to a batch, and the logits (B, V) of their first tokens, float32."""

    texts: list[str]
    logits: Tensor

    def next_token(self, full: Generation) -> dict[str, list[float]]:
        """Top-1 match and KL divergence of the next token against the full model's generation, for each sample."""
        return {
            "top1": top1_match(full.logits, self.logits).double().tolist(),
            "kl": kl_divergence_to(full.logits, self.logits).tolist(),
        }


def generate_with_logits(checkpoint: Checkpoint, inputs: Mapping[str, Any], max_new_tokens: int) -> Generation:
    """Answer a batch of left-padded prompts under the method that is applied to the model, if any."""
    found: list[Tensor] = []

    def keep_first(module: Any, args: Any, output: Any) -> None:
        if not found:
            found.append(output.logits[:, -1].float())

    handle = checkpoint.model.register_forward_hook(keep_first)
    try:
        texts = answer_greedily(checkpoint, inputs, max_new_tokens)
    finally:
        handle.remove()
    return Generation(texts, found[0])


def kl_divergence_to(full: Tensor, dropped: Tensor) -> Tensor:
    """(B,) float64, KL(full || dropped) in nats of the next-token distributions with these logits, (B, V) each."""
    distributions = (Categorical(logits=logits.double()) for logits in (full, dropped))
    return kl_divergence(*distributions).clamp(min=0)  # rounding can make it slightly negative


def top1_match(full: Tensor, dropped: Tensor) -> Tensor:
    """(B,) bool, True if the most likely next token is the same, by logits (B, V)."""
    return full.argmax(-1) == dropped.argmax(-1)
