"""Count what a method adds to a forward where launching is the time: operations of a prefill and of a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyramiddrop.hf.versions import cache_argument, output_cache
from pyramiddrop.inference.method_costs import MethodCost
from pyramiddrop.inference.timing import Clock, Spread, in_turn
from pyramiddrop.speed.subject import Subject

STEPS = 16  # of decoding in each run


@dataclass(frozen=True)
class Overhead:
    """One way to run, summed up over its runs.

    Attributes:
        prefill_ops, step_ops: ATen operations, on the device and on the host, of a prefill and of a decoding step.
            Views are not counted, for they compute nothing and launch nothing.
        prefill, step: seconds.
    """

    way: str
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
    ways: Sequence[MethodCost],
    batch: int,
    repeats: int,
    clock: Clock,
    tick: Callable[[], None] = lambda: None,
) -> list[Overhead]:
    """Run a prefill and some steps of `batch` equal samples in each of `ways`, in turn; a first round warms up.

    Args:
        tick: called after every run, also of the first round.
    """
    prefills: dict[str, list[float]] = {way.label: [] for way in ways}
    steps: dict[str, list[float]] = {way.label: [] for way in ways}
    ops: dict[str, tuple[int, int]] = {}
    for turn, way in in_turn(ways, repeats + 1):
        with torch.no_grad(), subject.under(way.method):
            if not turn:
                _forward(subject, batch)  # what a method asks once
                ops[way.label] = _count_ops(subject, batch)
            start = clock.mark()
            cache = _forward(subject, batch)
            end = clock.mark()
            marks = [clock.mark() for _ in range(STEPS) if _step(subject, batch, cache) is not None]
        if turn:
            prefills[way.label].append(clock.seconds(start, end))
            steps[way.label] += [clock.seconds(*pair) for pair in zip([end, *marks], marks, strict=False)]
        tick()
    return [
        Overhead(way.label, batch, *ops[way.label], Spread.of(prefills[way.label]), Spread.of(steps[way.label]))
        for way in ways
    ]


def _count_ops(subject: Subject, batch: int) -> tuple[int, int]:
    with _OpCounter() as prefill:
        cache = _forward(subject, batch)
    _step(subject, batch, cache)
    with _OpCounter() as step:
        _step(subject, batch, cache)
    return prefill.count, step.count


def _forward(subject: Subject, batch: int) -> Any:
    """The cache that a prefill fills."""
    return output_cache(subject.model(**subject.batch(batch), use_cache=True, logits_to_keep=1))


def _step(subject: Subject, batch: int, cache: Any) -> Tensor:
    """The logits of one token more."""
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=subject.model.device)
    logits: Tensor = subject.model(input_ids=tokens, **cache_argument(cache), use_cache=True).logits
    return logits
