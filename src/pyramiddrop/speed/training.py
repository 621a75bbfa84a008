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
    """A method, and the settings of its training step.

    Attributes:
        cost: the method, or vanilla, with its cost.
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
class StepTimes:
    """Seconds of one training step: `gradients` is forward and backward; `optimizer` is None if none runs."""

    forward: float
    backward: float
    gradients: float
    optimizer: float | None
    whole: float


@dataclass(frozen=True)
class TrainingStep:
    """Measurements of one variant, summarised over its steps.

    Attributes:
        forward, backward, gradients, optimizer, whole: seconds, see :class:`StepTimes`.
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

    A first round warms up and measures memory; its times are not counted.

    Args:
        optimizer: True to step AdamW, with a learning rate of zero, so that every step starts from the same weights.
        tick: called after every step, including the first round.
        lora_rank: rank of trained adapters on every linear layer of the decoder; None: all weights are trained.
    """
    times: list[list[StepTimes]] = [[] for _ in variants]
    peaks = [0] * len(variants)
    with _training(subject.model), _adapted(subject, lora_rank):
        adam = _adam(subject.model) if optimizer else None
        for turn, (index, variant) in in_turn(list(enumerate(variants)), repeats + 1):
            if turn:
                times[index].append(_step(subject, variant, batch, adam, clock))
            else:
                with peak_memory(subject.model.device) as peak:
                    _gradients(subject, variant, batch, clock)
                peaks[index] = peak.bytes
                _update(adam)
            subject.model.zero_grad(set_to_none=True)
            tick()
    frozen = lora_rank is not None
    return [_summed(subject, *found, batch, frozen) for found in zip(variants, times, peaks, strict=True)]


def _summed(
    subject: Subject,
    variant: TrainingVariant,
    times: Sequence[StepTimes],
    peak_bytes: int,
    batch: int,
    frozen: bool,
) -> TrainingStep:
    updates = [one.optimizer for one in times if one.optimizer is not None]
    return TrainingStep(
        variant=variant.cost.label,
        logits=variant.logits,
        checkpointing=variant.checkpointing,
        batch=batch,
        forward=Spread.of([one.forward for one in times]),
        backward=Spread.of([one.backward for one in times]),
        gradients=Spread.of([one.gradients for one in times]),
        optimizer=Spread.of(updates) if updates else None,
        whole=Spread.of([one.whole for one in times]),
        peak_bytes=peak_bytes,
        predicted_flops=predict_step(
            variant.cost,
            subject.info.shape,
            subject.prompt,
            batch,
            variant.logits == "kept",
            variant.checkpointing,
            frozen,
        ),
    )


def _step(subject: Subject, variant: TrainingVariant, batch: int, adam: Any, clock: Clock) -> StepTimes:
    """Run one step: loss, gradients, and the optimizer's update if there is one."""
    start, middle, end = _gradients(subject, variant, batch, clock)
    _update(adam)
    updated = clock.mark() if adam else end
    return StepTimes(
        forward=clock.seconds(start, middle),
        backward=clock.seconds(middle, end),
        gradients=clock.seconds(start, end),
        optimizer=clock.seconds(end, updated) if adam else None,
        whole=clock.seconds(start, updated),
    )


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


def _adam(model: Any) -> torch.optim.AdamW:
    """AdamW, fused on a GPU: otherwise it needs memory of the weights' size once more."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, fused=model.device.type == "cuda")


def _update(adam: Any) -> None:
    if adam:
        adam.step()


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
