"""Count operations, compiled graphs and host waits of a forward, which show what a method adds to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from pyramiddrop.hf import shared_copy
from pyramiddrop.hf.versions import cache_argument, output_cache
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, Spread, in_turn
from pyramiddrop.speed.subject import Subject, resized

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

    `tick` is called once for each method after every round.
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


@dataclass(frozen=True)
class Graphs:
    """Graph counts of one variant.

    Attributes:
        graphs: number of graphs after each of the pictures, with each layer compiled.
        waits: how often the host waits for the device in an eager prefill; None without a GPU.
    """

    variant: str
    graphs: tuple[int, ...]
    waits: int | None


def count_graphs(
    subject: Subject,
    variants: Sequence[MethodCost],
    visual_tokens: Sequence[int],
    backend: str,
    tick: Callable[[], None] = lambda: None,
) -> list[Graphs]:
    """Prefill one sample of each of `visual_tokens` for each of `variants`, without a cache; a graph break raises.

    The subject is one of a shape, and `backend` that of `torch.compile`. `tick` is called after each method.
    """
    found, layers = [], subject.info.layers
    for variant in variants:
        waits, graphs = count_waits(subject, variant), list[int]()
        torch._dynamo.reset()
        counters.clear()
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
        try:
            for one in (resized(subject, tokens) for tokens in visual_tokens):
                with torch.no_grad(), one.under(variant.method):
                    one.model(**one.inputs, use_cache=False, logits_to_keep=1)
                graphs.append(counters["stats"]["unique_graphs"])
        finally:
            for layer in layers:
                del layer.forward  # an attribute of this layer that hides its class's method
        found.append(Graphs(variant.label, tuple(graphs), waits))
        tick()
    return found


def count_waits(subject: Subject, variant: MethodCost) -> int | None:
    """Number of host waits in one prefill of one sample, after a warm-up, as far as PyTorch's sync debug mode notices
    them; None without a CUDA device."""
    if subject.model.device.type != "cuda":
        return None
    with torch.no_grad(), subject.under(variant.method):
        subject.model(**subject.inputs, logits_to_keep=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                subject.model(**subject.inputs, logits_to_keep=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in seen)
