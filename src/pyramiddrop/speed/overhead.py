"""Count the operations that a method adds to a prefill and to a decode step, whose time is that of launching them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyramiddrop.hf import shared_copy
from pyramiddrop.hf.versions import cache_argument, output_cache
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, Spread, in_turn
from pyramiddrop.speed.subject import Subject

PREFILLS, STEPS = 4, 16  # in each round, one step of every method in turn


@dataclass(frozen=True)
class Overhead:
    """Measurements of one variant, summarised over its runs.

    Attributes:
        prefill_ops, step_ops: number of ATen operations, on the device and on the host, of a prefill and of a decode
            step, without views, which launch nothing.
        prefill, step: seconds.
    """

    variant: str
    batch: int
    prefill_ops: int
    step_ops: int
    prefill: Spread
    step: Spread


class _OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count ATen operations without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view)
        return func(*args, **(kwargs or {}))


def measure_overhead(
    subject: Subject,
    variants: Sequence[MethodCost],
    batch: int,
    repeats: int,
    clock: Clock,
    tick: Callable[[], None] = lambda: None,
) -> list[Overhead]:
    """Run a prefill and some steps of `batch` equal samples for each of `variants`, in turn; a first round warms up.

    Args:
        tick: called once for each method after every round, including the first one.
    """
    names = [variant.label for variant in variants]
    prefills, steps = ({name: list[float]() for name in names} for _ in range(2))
    with torch.no_grad(), ExitStack() as stack:
        # One model object for each method, on the same weights, so that steps take turns too.
        subjects = {name: replace(subject, model=shared_copy(subject.model)) for name in names}
        for variant in variants:
            stack.enter_context(subjects[variant.label].under(variant.method))
        for name in names:
            _forward(subjects[name], batch)  # one-time checks of the method
        ops = {name: _count_ops(subjects[name], batch) for name in names}
        for turn in range(repeats + 1):
            caches: dict[str, Any] = {}
            for _, name in in_turn(names, PREFILLS):
                start = clock.mark()
                caches[name] = _forward(subjects[name], batch)
                prefills[name] += [clock.seconds(start, clock.mark())] if turn else []
            for _, name in in_turn(names, STEPS):
                start = clock.mark()
                _step(subjects[name], batch, caches[name])
                steps[name] += [clock.seconds(start, clock.mark())] if turn else []
            for _ in names:
                tick()
    return [Overhead(name, batch, *ops[name], Spread.of(prefills[name]), Spread.of(steps[name])) for name in names]


def _count_ops(subject: Subject, batch: int) -> tuple[int, int]:
    with _OpCounter() as prefill:
        cache = _forward(subject, batch)
    _step(subject, batch, cache)
    with _OpCounter() as step:
        _step(subject, batch, cache)
    return prefill.count, step.count


def _forward(subject: Subject, batch: int) -> Any:
    """Run a prefill and return its cache."""
    return output_cache(subject.model(**subject.batch(batch), use_cache=True, logits_to_keep=1))


def _step(subject: Subject, batch: int, cache: Any) -> Tensor:
    """Run one decode step and return its logits."""
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=subject.model.device)
    logits: Tensor = subject.model(input_ids=tokens, **cache_argument(cache), use_cache=True).logits
    return logits
