"""Measure peak memory: the most bytes of tensors at one time, above those before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
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
    if device.type == "cuda":
        square = torch.ones(64, 64, device=device)
        _ = square @ square  # cuBLAS allocates its workspace once, which should not count for the first run
        del square, _
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr
        with profile(use_cpu=True, profile_memory=True) as profiler:
            yield peak
        # Allocations have positive bytes, releases negative ones.
        changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        peak.bytes = max(accumulate((event.nbytes() for event in changes), initial=0))


def total_memory(device: torch.device) -> int:
    """Total bytes of memory of the machine, or of its CUDA device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache keeps allocated: keys and values, and the states of recurrent layers.

    A view keeps its whole storage allocated: after a prefill, a layer with a window still holds all rows.
    """
    found = []
    for layer in cache.layers:
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        found += [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return sum(tensor.untyped_storage().nbytes() for tensor in found if tensor is not None)
