"""Time the prefill of one prompt under several methods in turn, so that noise affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pyramiddrop import Method
from pyramiddrop.inference.answer import on_model

Way = TypeVar("Way")


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
    for turn, name in in_turn(list(methods), runs + 1):
        measured = _one(model, ready, methods[name])
        if turn:
            seen[name].append(measured)
    return {
        name: PrefillTime(
            statistics.median(one.wall for one in times),
            statistics.median(one.cpu for one in times),
        )
        for name, times in seen.items()
    }


def in_turn(ways: Sequence[Way], rounds: int) -> Iterator[tuple[int, Way]]:
    """Every way once a round, with the round's number. Each round starts with another way: none is always first.

    Noise that lasts longer than a round falls on all alike.
    """
    for turn in range(rounds):
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            yield turn, way


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on `count` CPU threads: small models gain nothing from several, and those of a busy machine wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
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
