"""Solve the budget that the command line gives; budgets in milliseconds time a decoder layer on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from pyramiddrop.cost import DecoderShape
from pyramiddrop.hf.query_key import extract
from pyramiddrop.hf.rows import take_embeddings
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import pick_device, pick_dtype
from pyramiddrop.inference.resolve import parse_method
from pyramiddrop.inference.sizes import Sizes
from pyramiddrop.inference.timing import synchronize
from pyramiddrop.methods import PreLLMMethod
from pyramiddrop.planning import Before, Budget, MeasuredTimes, Plan, Profile, plan
from pyramiddrop.schedule import PreLLMSchedule
from pyramiddrop.scoring import attention_received

RUNS = 3


class LayerProfiler:
    """Measures milliseconds of a decoder layer with random weights on the best device of this machine.

    Each number of rows is measured once: a warm-up, then the median of 3 runs. Only decoder layers are measured, not
    the vision tower, the embeddings or the head.

    Raises:
        InputError: for a mixture of experts, whose time depends on its router, and for layers that do not all have full
            attention with the same heads.
    """

    def __init__(self, shape: DecoderShape) -> None:
        if shape.experts is not None:
            raise InputError("--measure cannot time a mixture of experts from its sizes; give another kind of budget")
        if shape.mixers or shape.widths or shape.further or shape.matrices != 3:
            raise InputError("--measure cannot time layers that differ from Llama's; give another kind of budget")
        self.device = pick_device(None)
        dtype = pick_dtype(self.device, None)
        assert isinstance(dtype, torch.dtype)
        config: Any = _config(shape)
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
                work = prepare(rows)
                times = [self._timed(work) for _ in range(RUNS + 1)]
            self._seen[kind, rows] = 1000 * statistics.median(times[1:])
        return self._seen[kind, rows]

    def _timed(self, work: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - start

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


def _config(shape: DecoderShape) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    config._attn_implementation = "sdpa"
    return config


#: Names of budgets on the command line, and in the library.
KINDS = {
    "average_tokens": "tokens",
    "tflops": "tflops",
    "percent": "percent",
    "kv_bytes": "kv_bytes",
    "measure": "milliseconds",
}


@dataclass(frozen=True)
class BudgetOptions:
    """The options of `plan`, None if not given. `measure` is in milliseconds."""

    average_tokens: float | None = None
    tflops: float | None = None
    percent: float | None = None
    kv_bytes: float | None = None
    measure: float | None = None
    convention: str = "full"
    stages: int | None = None
    lam: float | None = None
    pyramid: str | None = None
    profile: Path | None = None
    before: str | None = None


def make_plan(options: BudgetOptions, sizes: Sizes) -> Plan:
    """Solve for the plan that `options` describe.

    Raises:
        InputError: if there is not exactly one budget, it is out of reach, options contradict each other, or a value is
            not allowed.
    """
    budget = _budget(options, sizes)
    profile = None
    if options.profile is not None:
        with user_input(f"cannot read {options.profile}", (OSError,)), user_input():
            profile = Profile.read(options.profile)
    with user_input():
        return plan(
            sizes.shape,
            sizes.prompt,
            budget,
            lam=options.lam,
            stages=options.stages,
            pyramid=options.pyramid,
            profile=profile,
            before=_before(options.before, sizes),
        )


def read_times(path: Path, sizes: Sizes) -> MeasuredTimes:
    """What bench has measured of the model and the prompt in `sizes`.

    Raises:
        InputError: for a file that cannot be read, is no such record, or is one of another model or prompt.
    """
    with user_input(f"cannot read {path}", (OSError,)), user_input():
        times = MeasuredTimes.read(path)
        times.check(sizes.shape, sizes.prompt)
    return times


def _before(spec: str | None, sizes: Sizes) -> Before | None:
    """Parse `spec` as a method that drops before the decoder."""
    if spec is None:
        return None
    method = parse_method(spec)
    if not isinstance(method, PreLLMMethod):
        raise InputError(f"--before takes a method that drops before the decoder, vision or downsample; got {spec!r}")
    schedule = PreLLMSchedule(method.schedule(sizes.shape.decoder.layers).stages)
    return Before(schedule, repr(method), method.ranking_flops)


def _budget(options: BudgetOptions, sizes: Sizes) -> Budget:
    given = {word: getattr(options, word) for word in KINDS if getattr(options, word) is not None}
    if len(given) != 1:
        words = ", ".join(f"--{word.replace('_', '-')}" for word in given or KINDS)
        raise InputError(f"give one budget; got {words}" if given else f"give a budget: one of {words}")
    ((word, limit),) = given.items()
    clock = None
    if word == "measure":
        from pyramiddrop.inference.budgets import LayerProfiler

        clock = LayerProfiler(sizes.shape.decoder)
    with user_input():
        return Budget(**{KINDS[word]: limit}, convention=options.convention, clock=clock)
