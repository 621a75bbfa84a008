"""Owns the measurement of prefills: several ways to run one prompt, taken in turn, so that noise falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pyramiddrop import Method
from pyramiddrop.inference.answer import on_model


@dataclass(frozen=True)
class PrefillTime:
    """Medians of one prefill in seconds: by the clock on the wall, and of this process's CPU time over all threads."""

    wall: float
    cpu: float


def time_prefills(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Mapping[str, Method | None],
    runs: int = 5,
) -> dict[str, PrefillTime]:
    """Time the prefill of `inputs` under each of `methods` (None: the model as it is), after one warm-up each.

    The whole forward is timed, the vision tower included: that is what a user waits for. Attaching and removing the
    method is not, for that is done once.

    Args:
        runs: how often each is measured; the ways take turns.
    """
    ready = on_model(model, inputs)
    seen: dict[str, list[PrefillTime]] = {name: [] for name in methods}
    for turn in range(runs + 1):
        for name, method in methods.items():
            measured = _one(model, ready, method)
            if turn:
                seen[name].append(measured)
    return {
        name: PrefillTime(
            statistics.median(one.wall for one in times),
            statistics.median(one.cpu for one in times),
        )
        for name, times in seen.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread: small models gain nothing from more, and threads of a busy machine wait in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one(model: Any, ready: dict[str, Any], method: Method | None) -> PrefillTime:
    with torch.inference_mode(), method(model) if method else nullcontext():
        _wait(model.device)
        wall, cpu = time.perf_counter(), time.process_time()
        model(**ready, use_cache=True, logits_to_keep=1)
        _wait(model.device)
        return PrefillTime(time.perf_counter() - wall, time.process_time() - cpu)


def _wait(device: torch.device) -> None:
    """A GPU works on after the call has come back; wait until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
