"""Owns the optimiser of the digits model: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the coefficients of Keller Jordan's Muon


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a stack (N, rows, columns), by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """Muon with all matrices of one shape in one batched product, in fp32.

    ``torch.optim.Muon`` goes matrix by matrix and in bf16, which a CPU without bf16 instructions computes about twenty
    times slower than fp32. The update is the same, scaled to AdamW's root mean square.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in params:
            groups.setdefault(parameter.shape, []).append(parameter)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": matrices} for matrices in groups.values()], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; all matrices of one shape must have one, or none."""
        for group in self.param_groups:
            matrices = group["params"]
            if matrices[0].grad is None:
                continue
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(gradient.lerp(state["momentum"], group["momentum"]))
            rate, size = group["lr"], 0.2 * max(matrices[0].shape) ** 0.5
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate * size)


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices; AdamW for embeddings, norms and biases."""
    matrices, others = [], []
    for name, parameter in named:
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name and "position_embedding" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        StackedMuon(matrices, lr=muon_lr),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Every learning rate at ``factor`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
