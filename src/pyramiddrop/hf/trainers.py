"""Check the trainer that calls a model: its reference model drops as the trained one does, and gets all the logits."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import nn

from pyramiddrop.hf.run import Rules


class TrainerCheck:
    """A forward pre-hook that looks once for a `Trainer` with a reference model (TRL's DPO, KTO, GRPO and RLOO).

    No trainer tells its models of each other, and so it is found among the callers. Forwards with a cache, those of
    `generate`, are left alone.

    Args:
        rules: of the method on the model.
        rules_of: gives the rules of the method on another model, or None.
        cache_of: gives the cache among the arguments of a forward, or None.
    """

    def __init__(
        self, rules: Rules, rules_of: Callable[[nn.Module], Rules | None], cache_of: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.rules, self.rules_of, self.cache_of = rules, rules_of, cache_of
        self._done = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the trainer of this forward.

        Raises:
            ValueError: for `logits="kept"` under a trainer that reads a log-probability for each column.
        """
        if torch.compiler.is_compiling() or self._done or self.cache_of(kwargs) is not None:
            return
        trainer = _calling_trainer()
        self._done = trainer is not None or module.training
        if trainer is None:
            return
        name = type(trainer).__name__
        if self.rules.logits == "kept":
            raise ValueError(
                f'logits="kept" is not supported under {name}, which reads the logits of all columns; use logits="full"'
            )
        if trainer.ref_model is not None and not self._drops_alike(trainer.ref_model):
            warnings.warn(
                f"the reference model of {name} does not drop visual tokens as the trained model does, and the two are "
                "compared as if it did. Before training: pyramiddrop.apply(trainer.ref_model, method)",
                stacklevel=2,
            )

    def _drops_alike(self, reference: nn.Module) -> bool:
        found = self.rules_of(reference)
        return found is not None and replace(found, choosing=self.rules.choosing) == self.rules


def _calling_trainer() -> Any:
    """The innermost `Trainer` with a place for a reference model that calls this forward, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(type(owner), "compute_loss") and hasattr(owner, "ref_model"):
            return owner
        frame = frame.f_back
    return None
