"""Measure training steps: forward, backward and optimizer, and peak memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pyramiddrop.inference import user_input
from pyramiddrop.inference.resolve import with_logits
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, Spread, in_turn
from pyramiddrop.methods import Logits, Method
from pyramiddrop.speed.memory import peak_memory
from pyramiddrop.speed.predicted import predict_step
from pyramiddrop.speed.subject import Subject

LOGITS: tuple[Logits, ...] = ("full", "kept")


@dataclass(frozen=True)
class TrainingVariant:
    """A method or vanilla, and the settings of its training step.

    Attributes:
        logits: "full": of every row; "kept": of the remaining rows, for methods only.
        checkpointing: True to recompute layers in the backward pass, which saves memory.
    """

    cost: MethodCost
    logits: Logits
    checkpointing: bool

    @property
    def method(self) -> Method | None:
        """The method with these logits."""
        return with_logits(self.cost.method, self.logits) if self.cost.method else None


@dataclass(frozen=True)
class TrainingStep:
    """Measurements of one variant, summarised over its steps.

    Attributes:
        forward, backward, gradients, optimizer, whole: seconds; `gradients` is forward and backward, and `optimizer`
            is None if none runs.
        peak_bytes: peak memory of forward and backward above the weights and the inputs: activations and gradients. The
            optimizer's state is the same for all methods and not included.
        predicted_flops: FLOPs of the decoder's layers, ranking and head; a backward pass counts as two forwards.
    """

    variant: str
    logits: str
    checkpointing: bool
    batch: int
    forward: Spread
    backward: Spread
    gradients: Spread
    optimizer: Spread | None
    whole: Spread
    peak_bytes: int
    predicted_flops: int


def training_variants(variants: Sequence[MethodCost]) -> list[TrainingVariant]:
    """Each method with full and (except vanilla) kept logits, without and with gradient checkpointing."""
    return [
        TrainingVariant(variant, logits, checkpointing)
        for checkpointing in (False, True)
        for variant in variants
        for logits in (LOGITS if variant.method else LOGITS[:1])
    ]


def measure_training(
    subject: Subject,
    variants: Sequence[TrainingVariant],
    batch: int,
    repeats: int,
    clock: Clock,
    optimizer: bool = True,
    tick: Callable[[], None] = lambda: None,
    lora_rank: int | None = None,
) -> list[TrainingStep]:
    """Train for a step on `batch` equal samples for each of `variants`, in turn, `repeats` times each.

    A first round warms up and measures memory; its times are not counted. `tick` is called after every step.

    Args:
        optimizer: True to step AdamW, with a learning rate of zero, so that every step starts from the same weights.
        lora_rank: rank of trained adapters on every linear layer of the decoder; None: all weights are trained.
    """
    times: list[list[dict[str, Any]]] = [[] for _ in variants]
    peaks = [0] * len(variants)
    with _training(subject.model), _adapted(subject, lora_rank):
        trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
        # Fused on a GPU: otherwise it needs memory of the weights' size once more.
        fused = subject.model.device.type == "cuda"
        adam = torch.optim.AdamW(trained, lr=0.0, fused=fused) if optimizer else None
        for turn, (index, variant) in in_turn(list(enumerate(variants)), repeats + 1):
            if turn:
                times[index].append(_step(subject, variant, batch, adam, clock))
            else:
                with peak_memory(subject.model.device) as peak:
                    _gradients(subject, variant, batch, clock)
                peaks[index] = peak.bytes
                if adam:
                    adam.step()
            subject.model.zero_grad(set_to_none=True)
            tick()
    shape, prompt, frozen = subject.info.shape, subject.prompt, lora_rank is not None
    found = []
    for one, steps, peak_bytes in zip(variants, times, peaks, strict=True):
        flops = predict_step(one.cost, shape, prompt, batch, one.logits == "kept", one.checkpointing, frozen)
        measured = {**Spread.of_each(steps), "peak_bytes": peak_bytes, "predicted_flops": flops}
        found.append(TrainingStep(one.cost.label, one.logits, one.checkpointing, batch, **measured))
    return found


def _step(subject: Subject, variant: TrainingVariant, batch: int, adam: Any, clock: Clock) -> dict[str, Any]:
    """Run one step, with the optimizer's update if there is one; its seconds, by the names of `TrainingStep`."""
    start, middle, end = _gradients(subject, variant, batch, clock)
    if adam:
        adam.step()
    updated = clock.mark() if adam else end
    return {
        "forward": clock.seconds(start, middle),
        "backward": clock.seconds(middle, end),
        "gradients": clock.seconds(start, end),
        "optimizer": clock.seconds(end, updated) if adam else None,
        "whole": clock.seconds(start, updated),
    }


def _gradients(subject: Subject, variant: TrainingVariant, batch: int, clock: Clock) -> tuple[Any, Any, Any]:
    """Compute loss and gradients, with marks before the forward, between forward and backward, and after."""
    inputs = subject.batch(batch)
    labels = torch.cat([subject.labels] * batch)
    with subject.under(variant.method), _checkpointing(subject.model, variant.checkpointing):
        start = clock.mark()
        loss = subject.model(**inputs, labels=labels, use_cache=False).loss
        middle = clock.mark()
        loss.backward()
        return start, middle, clock.mark()


@contextmanager
def _training(model: Any) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


@contextmanager
def _adapted(subject: Subject, rank: int | None) -> Iterator[None]:
    """Add adapters of this rank to the decoder's linear layers and freeze all other weights; None changes nothing."""
    if rank is None:
        yield
        return
    with user_input("LoRA needs PEFT, pip install 'pyramiddrop[train]'", (ImportError,)):
        from peft import LoraConfig, get_peft_model
    linear = {id(module) for module in subject.info.layers.modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name, module in subject.model.named_modules() if id(module) in linear]
    frozen_before = {name: one.requires_grad for name, one in subject.model.named_parameters()}
    adapted = get_peft_model(subject.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    try:
        yield
    finally:
        adapted.unload()
        for name, one in subject.model.named_parameters():
            one.requires_grad_(frozen_before[name])


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        # Of the two names of this switch, the one in the oldest supported Transformers is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        if wanted:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
