"""Measure generation (time to the first token, of a step and of the call; memory), and steps on a static cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.hf.versions import cache_argument
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, Spread, in_turn
from pyramiddrop.speed.memory import cache_bytes, peak_memory
from pyramiddrop.speed.predicted import Predicted, predict
from pyramiddrop.speed.subject import Subject


@dataclass(frozen=True)
class Generation:
    """Measurements of one variant, summarised over its runs; all times are seconds.

    Attributes:
        first_token: time to the first token's logits, which is the prefill.
        decoder: the part of it in the text model and in the method's hooks around it.
        dropping: the part of it in the method's hooks: planning, ranking, gathering rows, masks and positions.
        step: average time of a later token; None if there is only one token.
        whole: time of the whole call of `generate`.
        peak_bytes: peak memory during the call, above the weights and the inputs.
        kv_bytes: bytes of keys, values and states in the cache after the prefill.
        predicted: the cost model's prediction.
    """

    variant: str
    batch: int
    first_token: Spread
    decoder: Spread
    dropping: Spread
    step: Spread | None
    whole: Spread
    peak_bytes: int
    kv_bytes: int
    predicted: Predicted


def measure_generation(
    subject: Subject,
    variants: Sequence[MethodCost],
    batch: int,
    new_tokens: int,
    repeats: int,
    clock: Clock,
    tick: Callable[[], None] = lambda: None,
) -> list[Generation]:
    """Generate `new_tokens` for `batch` equal samples for each of `variants`, taken in turn, `repeats` times each.

    A first round warms up and measures memory; its times are not counted. `tick` is called after every run.
    """
    times: dict[str, list[dict[str, Any]]] = {variant.label: [] for variant in variants}
    memory: dict[str, dict[str, Any]] = {}
    for turn, variant in in_turn(variants, repeats + 1):
        if turn:
            times[variant.label].append(_generate(subject, variant, batch, new_tokens, clock)[0])
        else:
            with peak_memory(subject.model.device) as peak:
                kv_bytes = _generate(subject, variant, batch, new_tokens, clock)[1]
            memory[variant.label] = {"peak_bytes": peak.bytes, "kv_bytes": kv_bytes}
        tick()
    shape, prompt = subject.info.shape, subject.prompt
    return [
        Generation(
            one.label,
            batch,
            **Spread.of_each(times[one.label]),
            **memory[one.label],
            predicted=predict(one, shape, prompt, batch),
        )
        for one in variants
    ]


def _generate(
    subject: Subject, variant: MethodCost, batch: int, new_tokens: int, clock: Clock
) -> tuple[dict[str, Any], int]:
    """Call `generate` once: its seconds, by the names of `Generation`, and the KV bytes after its prefill."""
    inputs, cache = subject.batch(batch), DynamicCache(config=subject.info.text.config)
    watch = _PrefillWatch(subject.info, clock)
    with torch.inference_mode():
        watch.before_method()
        with subject.under(variant.method):
            watch.after_method()
            if variant.method and subject.model.device.type == "cuda":
                _settle(subject, inputs, watch)
            tokens = _Tokens(clock, cache, watch)
            start = clock.mark()
            subject.model.generate(
                **inputs,
                **cache_argument(cache),
                logits_processor=[tokens],
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
            )
            end = clock.mark()
    first, last, steps = tokens.marks[0], tokens.marks[-1], len(tokens.marks) - 1
    seconds = {
        "first_token": clock.seconds(start, first),
        **watch.seconds(),
        "step": clock.seconds(first, last) / steps if steps else None,
        "whole": clock.seconds(start, end),
    }
    return seconds, tokens.kv_bytes


class _Tokens:
    """A logits processor that marks when each token's logits are ready, and measures the cache after the prefill."""

    def __init__(self, clock: Clock, cache: Any, watch: _PrefillWatch) -> None:
        self.clock, self.cache, self.watch = clock, cache, watch
        self.marks: list[Any] = []
        self.kv_bytes = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.append(self.clock.mark())
        if len(self.marks) == 1:
            self.watch.remove()
            self.kv_bytes = cache_bytes(self.cache)
        return scores


def _settle(subject: Subject, inputs: Mapping[str, Tensor], watch: _PrefillWatch) -> None:
    """Run an untimed prefill: the first one with a method checks how to extract keys, and waits for the device."""
    subject.model(**inputs, use_cache=False, logits_to_keep=1)
    watch.forget()


class _PrefillWatch:
    """Marks the time in a method's hooks, by further hooks before and after them, and the time in the text model."""

    def __init__(self, info: ModelInfo, clock: Clock) -> None:
        self.text, self.clock = info.text, clock
        self.around, self.inside = info.wrappers, (info.text, *info.layers)
        self.spans: dict[bool, list[tuple[Any, Any]]] = {True: [], False: []}  # in the text model (True), or around it
        self.entered: Any = None
        self.handles: list[Any] = []
        self._open: Any = None

    def before_method(self) -> None:
        """Install the hooks that run before the method's, as hooks run in the order of installation."""
        self.handles.append(self.text.register_forward_pre_hook(self._enter))
        self.handles += [module.register_forward_pre_hook(self._start) for module in (*self.around, *self.inside)]
        self.handles.append(self.text.register_forward_hook(self._start))

    def after_method(self) -> None:
        """Install the hooks that run after the method's."""
        for inside, modules in ((False, self.around), (True, self.inside)):
            end = partial(self._end, inside)
            self.handles += [module.register_forward_pre_hook(end) for module in modules]
        self.handles.append(self.text.register_forward_hook(partial(self._end, True)))

    def forget(self) -> None:
        """Discard all marks so far."""
        self.spans = {True: [], False: []}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def seconds(self) -> dict[str, float]:
        """The times `decoder` and `dropping` of `Generation`."""
        inside, around = (sum(starmap(self.clock.seconds, self.spans[where])) for where in (True, False))
        text_model = self.clock.seconds(self.entered, self.spans[True][-1][1])
        return {"decoder": text_model + around, "dropping": inside + around}

    def _enter(self, *_: Any) -> None:
        self.entered = self.clock.mark()

    def _start(self, *_: Any) -> None:
        self._open = self.clock.mark()

    def _end(self, inside: bool, *_: Any) -> None:
        self.spans[inside].append((self._open, self.clock.mark()))


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
    is not counted. `tick` is called after every run.
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
        positions = (mask.cumsum(1) - 1)[:, -1:].contiguous()
        given = {"attention_mask": mask, "position_ids": positions, **cache_argument(cache)}
        output = step(**subject.model.prepare_inputs_for_generation(tokens, **given))  # as `generate` does
    return clock.seconds(start, clock.mark())
