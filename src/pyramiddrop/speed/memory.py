"""Measure peak memory: the most bytes of tensors at one moment, above the bytes before."""

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
    """Bytes above what was there at the start, known when the block is left."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the tensors that the block allocates on `device`, a CPU or a CUDA device.

    On a CPU every allocation is recorded by PyTorch's profiler, which takes time: do not time the same run.
    """
    peak = Peak()
    with _on_cuda(device, peak) if device.type == "cuda" else _on_cpu(peak):
        yield peak


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the machine, or its CUDA device, has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache keeps from being freed: of keys and values, and of the states of recurrent layers.

    Of a tensor that is a view this is more than its own: after a prefill a layer with a window still holds all rows.
    """
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in _cached(layer))


def _cached(layer: Any) -> list[Tensor]:
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    found = (getattr(layer, "keys", None), getattr(layer, "values", None), *states)
    return [tensor for tensor in found if tensor is not None]


@contextmanager
def _on_cuda(device: torch.device, peak: Peak) -> Iterator[None]:
    square = torch.ones(64, 64, device=device)
    _ = square @ square  # cuBLAS takes its workspace once; the first run shall not be charged for it
    del square, _
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    torch.cuda.synchronize(device)
    peak.bytes = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _on_cpu(peak: Peak) -> Iterator[None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or else the profiler writes lines of its own to stderr
    with profile(use_cpu=True, profile_memory=True) as profiler:
        yield
    peak.bytes = _highest(profiler.kineto_results.events())


def _highest(events: Iterable[Any]) -> int:
    """The highest sum of the profiler's allocations (positive bytes) and releases (negative ones), in their order."""
    changes = [event for event in events if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
