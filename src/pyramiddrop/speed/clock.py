"""Time work on a device, and summarise repeated measurements."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity: the median, the quartiles, and every run."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """Sum up at least one run. Quartiles are those of the runs themselves, interpolated."""
        if len(runs) == 1:
            return cls(runs[0], runs[0], runs[0], tuple(runs))
        low, median, high = statistics.quantiles(runs, n=4, method="inclusive")
        return cls(median, low, high, tuple(runs))


class Clock(ABC):
    """Marks moments of a device's work; the difference of two is known when the work is done.

    Attributes:
        name: what its seconds are.
    """

    name: str

    @abstractmethod
    def mark(self) -> Any:
        """This moment, behind all work that has been asked for so far."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """The seconds between two marks."""


class CpuClock(Clock):
    """CPU seconds of this process, for one thread: what other programs take of the machine is not counted."""

    name = "CPU seconds"

    def mark(self) -> float:
        return time.process_time()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class WallClock(CpuClock):
    """Seconds on the wall, for several CPU threads, whose CPU seconds would add up to more than a user waits."""

    name = "wall seconds"

    def mark(self) -> float:
        return time.perf_counter()


class CudaClock(Clock):
    """CUDA events: marks cost no synchronisation, and count what the device waits for Python, too.

    Args:
        device: whose work is timed; it need not be the current one.
    """

    name = "CUDA event seconds"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def clock_for(device: torch.device, threads: int) -> Clock:
    """The clock for work on `device`, of `threads` threads where that is a CPU."""
    if device.type == "cuda":
        return CudaClock(device)
    return CpuClock() if threads == 1 else WallClock()
