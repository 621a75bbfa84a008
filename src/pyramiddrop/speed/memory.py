"""Measure peak memory: the most bytes of tensors at one time, above those before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile


@dataclass
class Peak:
    """Peak bytes above those at the start, known after the block."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the tensors that the block allocates on `device`, a CPU or a CUDA device.

    On a CPU, PyTorch's profiler records every allocation, which takes time: do not time the same run.
    """
    peak = Peak()
    with _on_cuda(device, peak) if device.type == "cuda" else _on_cpu(peak):
        yield peak


def total_memory(device: torch.device) -> int:
    """Total bytes of memory of the machine, or of its CUDA device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache keeps allocated: keys and values, and the states of recurrent layers.

    A view keeps its whole storage allocated: after a prefill, a layer with a window still holds all rows.
    """
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in _cached(layer))


def _cached(layer: Any) -> list[Tensor]:
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    found = (getattr(layer, "keys", None), getattr(layer, "values", None), *states)
    return [tensor for tensor in found if tensor is not None]


@contextmanager
def _on_cuda(device: torch.device, peak: Peak) -> Iterator[None]:
    square = torch.ones(64, 64, device=device)
    _ = square @ square  # cuBLAS allocates its workspace once, which should not count for the first run
    del square, _
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    torch.cuda.synchronize(device)
    peak.bytes = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _on_cpu(peak: Peak) -> Iterator[None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr
    with profile(use_cpu=True, profile_memory=True) as profiler:
        yield
    peak.bytes = _highest(profiler.kineto_results.events())


def _highest(events: Iterable[Any]) -> int:
    """The highest running sum of the profiler's allocations (positive bytes) and releases (negative bytes)."""
    changes = [event for event in events if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
