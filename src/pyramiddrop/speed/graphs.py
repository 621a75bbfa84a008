"""Count compiled graphs over pictures of several sizes, and host waits of a prefill on a CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.speed.subject import Subject, resized


@dataclass(frozen=True)
class Graphs:
    """Graph counts of one variant.

    Attributes:
        graphs: number of graphs after each of the pictures, with each layer compiled.
        waits: how often the host waits for the device in an eager prefill; None without a GPU.
    """

    variant: str
    graphs: tuple[int, ...]
    waits: int | None


def count_graphs(
    subject: Subject,
    variants: Sequence[MethodCost],
    visual_tokens: Sequence[int],
    backend: str,
    tick: Callable[[], None] = lambda: None,
) -> list[Graphs]:
    """Prefill one sample of each of `visual_tokens` for each of `variants`, without a cache; a graph break raises.

    Args:
        subject: the subject of a shape.
        backend: the backend of `torch.compile`.
        tick: called after each method.
    """
    found = []
    for variant in variants:
        waits = count_waits(subject, variant)
        found.append(Graphs(variant.label, tuple(_counts(subject, variant, visual_tokens, backend)), waits))
        tick()
    return found


def _counts(subject: Subject, variant: MethodCost, visual_tokens: Sequence[int], backend: str) -> list[int]:
    torch._dynamo.reset()
    counters.clear()
    layers = subject.info.layers
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
    try:
        return [_prefilled(resized(subject, tokens), variant) for tokens in visual_tokens]
    finally:
        for layer in layers:
            del layer.forward  # an attribute of this layer that hides its class's method


def _prefilled(subject: Subject, variant: MethodCost) -> int:
    with torch.no_grad(), subject.under(variant.method):
        subject.model(**subject.inputs, use_cache=False, logits_to_keep=1)
    return int(counters["stats"]["unique_graphs"])


_WAITED = "synchronizing CUDA operation"


def count_waits(subject: Subject, variant: MethodCost) -> int | None:
    """Number of host waits in one prefill of one sample, after a warm-up; None without a CUDA device.

    They are counted by PyTorch's sync debug mode, which does not notice every way to wait.
    """
    if subject.model.device.type != "cuda":
        return None
    with torch.no_grad(), subject.under(variant.method):
        subject.model(**subject.inputs, logits_to_keep=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                subject.model(**subject.inputs, logits_to_keep=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return sum(_WAITED in str(one.message) for one in seen)
