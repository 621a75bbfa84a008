"""Owns how like the full model a model with dropped tokens is, where no answers are known: by its next token."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Categorical, kl_divergence


def divergence(full: Tensor, dropped: Tensor) -> Tensor:
    """(B,) float64, KL(full || dropped) in nats of the next-token distributions with these logits, (B, V) each."""
    distributions = (Categorical(logits=logits.double()) for logits in (full, dropped))
    return kl_divergence(*distributions).clamp(min=0)  # rounding can leave it a hair below


def same_choice(full: Tensor, dropped: Tensor) -> Tensor:
    """(B,) bool, whether the likeliest next token is the same, by logits (B, V)."""
    return full.argmax(-1) == dropped.argmax(-1)
