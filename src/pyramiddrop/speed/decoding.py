"""Measure decoding on a static cache, eager and compiled: seconds of a step, and compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

from pyramiddrop.hf.versions import cache_argument
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, Spread
from pyramiddrop.speed.subject import Subject

#: Builds the function that runs a step from the model.
Compiler = Callable[[Any], Any]


def eager(model: Any) -> Any:
    """Run the model without compiling it."""
    return model


#: Compile a step into one CUDA graph without breaks.
reduce_overhead: Compiler = partial(torch.compile, mode="reduce-overhead", fullgraph=True)


@dataclass(frozen=True)
class Decoding:
    """Measurements of one variant, summarised over its runs.

    Attributes:
        compiled: the name of the compiler of a step.
        step: seconds of a decode step, averaged over a run.
        graphs: number of compiled graphs in all runs; 0 if nothing is compiled.
        not_captured: number of graphs that PyTorch did not capture as CUDA graphs.
    """

    variant: str
    compiled: str
    batch: int
    step: Spread
    graphs: int
    not_captured: int


def measure_decoding(
    subject: Subject,
    variants: Sequence[MethodCost],
    batch: int,
    steps: int,
    repeats: int,
    clock: Clock,
    compilers: Mapping[str, Compiler],
    tick: Callable[[], None] = lambda: None,
) -> list[Decoding]:
    """Decode `steps` tokens of `batch` equal samples for each of `variants` and `compilers`, `repeats` times each.

    The prompt is not compiled. Methods run one after another, because a compiled step contains the hooks that it was
    compiled with; all runs of a method share a cache, whose address a CUDA graph contains. The first run compiles and
    is not counted.

    Args:
        tick: called after every run, including first ones.
    """
    found = []
    for name, compiler in compilers.items():
        for variant in variants:
            torch._dynamo.reset()
            counters.clear()
            cache = StaticCache(config=subject.info.text.config, max_cache_len=subject.visual.shape[1] + steps + 1)
            with torch.no_grad(), subject.under(variant.method):
                step, times = compiler(subject.model), []
                for run in range(repeats + 1):
                    seconds = _decode(subject, batch, steps, clock, cache, step)
                    times += [seconds / steps] if run else []
                    tick()
            graphs, skipped = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
            found.append(Decoding(variant.label, name, batch, Spread.of(times), graphs, skipped))
    return found


def _decode(subject: Subject, batch: int, steps: int, clock: Clock, cache: StaticCache, step: Any) -> float:
    """Seconds of `steps` greedy tokens after the prompt, in a cache that is reset first."""
    cache.reset()
    inputs = subject.batch(batch)
    mask = inputs["attention_mask"]
    output = subject.model(**inputs, **cache_argument(cache), logits_to_keep=1)
    start = clock.mark()
    for _ in range(steps):
        tokens = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        output = step(**_prepared(subject.model, tokens, mask, cache))
    return clock.seconds(start, clock.mark())


def _prepared(model: Any, tokens: Tensor, mask: Tensor, cache: StaticCache) -> dict[str, Any]:
    """The arguments of a decode step, as `generate` prepares them."""
    positions = (mask.cumsum(1) - 1)[:, -1:].contiguous()
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(
        tokens, attention_mask=mask, position_ids=positions, **cache_argument(cache)
    )
    return prepared
