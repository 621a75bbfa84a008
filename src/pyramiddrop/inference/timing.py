"""Clocks for CPU and CUDA, statistics of repeated runs, prefills timed in turn, and a decoder timed layer by layer."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig

from pyramiddrop import Method
from pyramiddrop.cost import DecoderShape
from pyramiddrop.hf.query_key import extract
from pyramiddrop.hf.rows import take_embeddings
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import pick_device, pick_dtype
from pyramiddrop.inference.prompt import on_model
from pyramiddrop.scoring import attention_received

Variant = TypeVar("Variant")


@dataclass(frozen=True)
class PrefillTime:
    """Seconds of one prefill: wall time, and CPU time of this process over all threads."""

    wall: float
    cpu: float


def time_prefills(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Mapping[str, Method | None],
    runs: int = 5,
    over: Callable[[Iterable[float]], float] = statistics.median,
    own_inputs: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, PrefillTime]:
    """Time the prefill of `inputs` under each of `methods` (None: vanilla), after one warm-up each.

    The whole forward is timed, including the vision tower, because a user waits for all of it. One-time work is not:
    each method stays on a view of the model, whose first forward is the warm-up.

    Args:
        runs: number of runs of each method; the methods take turns.
        over: the statistic of the runs: the median, or `min` on a machine shared with other programs.
        own_inputs: inputs of methods, by name, that replace `inputs`, such as smaller pictures.
    """
    given = {name: (own_inputs or {}).get(name, inputs) for name in methods}
    ready = {name: on_model(model, one) for name, one in given.items()}
    models = {name: method.view(model) if method else model for name, method in methods.items()}
    seen: dict[str, list[PrefillTime]] = {name: [] for name in methods}
    for turn, name in in_turn(list(methods), runs + 1):
        measured = _one(models[name], ready[name])
        if turn:
            seen[name].append(measured)
    return {
        name: PrefillTime(over(one.wall for one in times), over(one.cpu for one in times))
        for name, times in seen.items()
    }


def in_turn(variants: Sequence[Variant], rounds: int) -> Iterator[tuple[int, Variant]]:
    """Yield every item once a round, with the round's number; each round starts with another item.

    Noise that lasts longer than a round then affects all items alike.
    """
    for turn in range(rounds):
        first = turn % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            yield turn, variant


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on `count` CPU threads within the block; threads of small models would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _one(model: Any, ready: dict[str, Any]) -> PrefillTime:
    synchronize(model.device)
    wall, cpu = time.perf_counter(), time.process_time()
    model(**ready, use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return PrefillTime(time.perf_counter() - wall, time.process_time() - cpu)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its asynchronous work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of a quantity: the median, the quartiles, and every run."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """Summarise at least one run; quartiles are interpolated between runs."""
        if len(runs) == 1:
            return cls(runs[0], runs[0], runs[0], tuple(runs))
        low, median, high = statistics.quantiles(runs, n=4, method="inclusive")
        return cls(median, low, high, tuple(runs))

    @classmethod
    def of_each(cls, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Summarise each quantity of `runs`, by name; None for those that were not measured."""
        return {name: None if value is None else cls.of([run[name] for run in runs]) for name, value in runs[0].items()}


class Clock(ABC):
    """Marks moments of a device's work; the time between two marks is known when the work is done.

    `name` says what kind of seconds it measures.
    """

    name: str

    @abstractmethod
    def mark(self) -> Any:
        """Mark the moment at which all work submitted so far is done."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """The seconds between two marks."""


class CpuClock(Clock):
    """CPU seconds of this process, for a single thread; other programs on the machine are not counted."""

    name = "CPU seconds"

    def mark(self) -> float:
        return time.process_time()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class WallClock(CpuClock):
    """Wall seconds, for several CPU threads, whose CPU seconds would add up to more than the waiting time."""

    name = "wall seconds"

    def mark(self) -> float:
        return time.perf_counter()


class CudaClock(Clock):
    """CUDA events on any device: marks need no synchronisation, and include the time that it waits for Python."""

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
    """The clock for work on `device`, with `threads` threads on a CPU."""
    if device.type == "cuda":
        return CudaClock(device)
    return CpuClock() if threads == 1 else WallClock()


RUNS = 3


class LayerProfiler:
    """Measures milliseconds of a decoder layer with random weights on the best device of this machine. Raises
    InputError for a mixture of experts, whose time depends on its router, and for layers that do not all have full
    attention with the same heads.

    Each number of rows is measured once: a warm-up, then the median of 3 runs. Only decoder layers are measured, not
    the vision tower, the embeddings or the head.
    """

    def __init__(self, shape: DecoderShape) -> None:
        if shape.experts is not None:
            raise InputError("--measure cannot time a mixture of experts from its sizes; give another kind of budget")
        if shape.mixers or shape.widths or shape.further or shape.matrices != 3:
            raise InputError("--measure cannot time layers that differ from Llama's; give another kind of budget")
        self.device = pick_device(None)
        dtype = pick_dtype(self.device, None)
        assert isinstance(dtype, torch.dtype)
        # Here, because all who time anything import this module.
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = text_config(LlamaConfig, replace(shape, layers=1, vocabulary=1))
        config._attn_implementation = "sdpa"
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            self._layer: Any = LlamaDecoderLayer(config, 0).to(dtype).eval()
            self._rotary: Any = LlamaRotaryEmbedding(config)
        self._shape, self._dtype = shape, dtype
        self._seen: dict[tuple[str, int], float] = {}

    def layer(self, rows: int) -> float:
        """Milliseconds of a layer over `rows` rows."""
        return self._measured("layer", rows, self._run_layer)

    def ranking(self, rows: int) -> float:
        """Milliseconds of ranking `rows` rows by the last row's attention."""
        return self._measured("ranking", rows, self._run_ranking)

    def _measured(self, kind: str, rows: int, prepare: Callable[[int], Callable[[], Any]]) -> float:
        if (kind, rows) not in self._seen:
            with torch.inference_mode():
                work, times = prepare(rows), []
                for _ in range(RUNS + 1):
                    synchronize(self.device)
                    start = time.perf_counter()
                    work()
                    synchronize(self.device)
                    times.append(time.perf_counter() - start)
            self._seen[kind, rows] = 1000 * statistics.median(times[1:])
        return self._seen[kind, rows]

    def _run_layer(self, rows: int) -> Callable[[], Any]:
        hidden, positions = self._inputs(rows)
        return lambda: self._layer(hidden, attention_mask=None, position_embeddings=positions)

    def _run_ranking(self, rows: int) -> Callable[[], Any]:
        hidden, positions = self._inputs(rows)
        asking = torch.tensor([[rows - 1]], device=self.device)
        visible = torch.ones(1, 1, 1, rows, dtype=torch.bool, device=self.device)
        weights = torch.ones(1, 1, device=self.device)

        def arguments(some: torch.Tensor | None) -> dict[str, Any]:
            own = positions if some is None else tuple(take_embeddings(table, some) for table in positions)
            return {"position_embeddings": own}

        def rank() -> torch.Tensor:
            seen = extract(self._layer, hidden, asking, arguments)
            return attention_received(seen.queries, seen.keys, visible, weights, seen.scale).sort().indices

        return rank

    def _inputs(self, rows: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden = torch.zeros(1, rows, self._shape.hidden, dtype=self._dtype, device=self.device)
        hidden += torch.linspace(-1, 1, self._shape.hidden, device=self.device)
        ids = torch.arange(rows, device=self.device)[None]
        return hidden, self._rotary(hidden, position_ids=ids)


def text_config(kind: Any, shape: DecoderShape, **settings: Any) -> Any:
    """The Transformers configuration of class `kind` with these sizes."""
    return kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
