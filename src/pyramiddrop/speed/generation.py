"""Measure generation: time to the first token, of a step and of the whole call, peak memory and KV bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pyramiddrop.hf.model_info import ModelInfo
from pyramiddrop.hf.versions import cache_argument
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, Spread, in_turn
from pyramiddrop.speed.memory import cache_bytes, peak_memory
from pyramiddrop.speed.predicted import Predicted, predict
from pyramiddrop.speed.subject import Subject


@dataclass(frozen=True)
class GenerationTimes:
    """Seconds of one call of `generate`.

    Attributes:
        first_token: time to the first token's logits, which is the prefill.
        decoder: the part of it in the text model and in the method's hooks around it.
        dropping: the part of it in the method's hooks: planning, ranking, gathering rows, masks and positions.
        step: average time of a later token; None if there is only one token.
        whole: time of the whole call.
    """

    first_token: float
    decoder: float
    dropping: float
    step: float | None
    whole: float


@dataclass(frozen=True)
class Generation:
    """Measurements of one variant, summarised over its runs.

    Attributes:
        first_token, decoder, dropping, step, whole: seconds, see :class:`GenerationTimes`.
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

    A first round warms up and measures memory; its times are not counted.

    Args:
        tick: called after every run, including the first round.
    """
    times: dict[str, list[GenerationTimes]] = {variant.label: [] for variant in variants}
    memory: dict[str, tuple[int, int]] = {}
    for turn, variant in in_turn(variants, repeats + 1):
        if turn:
            times[variant.label].append(_generate(subject, variant, batch, new_tokens, clock)[0])
        else:
            with peak_memory(subject.model.device) as peak:
                kv_bytes = _generate(subject, variant, batch, new_tokens, clock)[1]
            memory[variant.label] = peak.bytes, kv_bytes
        tick()
    return [_summed(subject, variant, batch, times[variant.label], *memory[variant.label]) for variant in variants]


def _summed(
    subject: Subject, variant: MethodCost, batch: int, times: Sequence[GenerationTimes], peak_bytes: int, kv_bytes: int
) -> Generation:
    steps = [one.step for one in times if one.step is not None]
    return Generation(
        variant=variant.label,
        batch=batch,
        first_token=Spread.of([one.first_token for one in times]),
        decoder=Spread.of([one.decoder for one in times]),
        dropping=Spread.of([one.dropping for one in times]),
        step=Spread.of(steps) if steps else None,
        whole=Spread.of([one.whole for one in times]),
        peak_bytes=peak_bytes,
        kv_bytes=kv_bytes,
        predicted=predict(variant, subject.info.shape, subject.prompt, batch),
    )


def _generate(
    subject: Subject, variant: MethodCost, batch: int, new_tokens: int, clock: Clock
) -> tuple[GenerationTimes, int]:
    """Call `generate` once: its times, and the KV bytes after its prefill."""
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
    return GenerationTimes(
        first_token=clock.seconds(start, first),
        decoder=watch.decoder_seconds(),
        dropping=watch.hook_seconds(),
        step=clock.seconds(first, last) / steps if steps else None,
        whole=clock.seconds(start, end),
    ), tokens.kv_bytes


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
    """Run an untimed prefill.

    The first one after a method was applied checks how to extract keys from its ranking layers, and waits for the
    device; this belongs to applying the method.
    """
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
        """Install the hooks that run before the method's; hooks run in the order of installation."""
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

    def hook_seconds(self) -> float:
        return self._sum(self.spans[True]) + self._sum(self.spans[False])

    def decoder_seconds(self) -> float:
        return self.clock.seconds(self.entered, self.spans[True][-1][1]) + self._sum(self.spans[False])

    def _sum(self, spans: Sequence[tuple[Any, Any]]) -> float:
        return sum(self.clock.seconds(start, end) for start, end in spans)

    def _enter(self, *_: Any) -> None:
        self.entered = self.clock.mark()

    def _start(self, *_: Any) -> None:
        self._open = self.clock.mark()

    def _end(self, inside: bool, *_: Any) -> None:
        self.spans[inside].append((self._open, self.clock.mark()))
