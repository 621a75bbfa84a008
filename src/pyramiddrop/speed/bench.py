"""Run a benchmark: from the user's options to a record of measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyramiddrop.assets import demo_images, demo_questions, reader_checkpoint
from pyramiddrop.cost import Prompt
from pyramiddrop.cost.model_sizes import decoder_shape
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import pick_device, read_config
from pyramiddrop.inference.request import Request, prepare
from pyramiddrop.inference.sizes import MethodCost
from pyramiddrop.inference.timing import Clock, clock_for, cpu_threads
from pyramiddrop.method_spec import VANILLA
from pyramiddrop.methods import Compose
from pyramiddrop.speed.generation import Compiler, Decoding, Generation, measure_decoding, measure_generation
from pyramiddrop.speed.overhead import Overhead, count_graphs, measure_overhead
from pyramiddrop.speed.predicted import choose_variants
from pyramiddrop.speed.record import (
    decoding_records,
    generation_records,
    machine,
    overhead_records,
    subject_record,
    training_records,
)
from pyramiddrop.speed.subject import Subject, checkpoint_subject, shape_subject, sizes_of
from pyramiddrop.speed.training import TrainingStep, measure_training, training_variants

TEXT_TOKENS = 64
Result = TypeVar("Result")


@dataclass(frozen=True)
class BenchOptions:
    """The options of `bench`, None if not given. Without a shape and a model, the bundled model runs.

    Attributes:
        shape: a name in :data:`pyramiddrop.speed.subject.SHAPES`, for random weights.
        num_layers, visual_tokens, text_tokens, pictures, padded: depth and prompt of a shape, see
            :func:`pyramiddrop.speed.subject.shape_subject`.
        model, images, prompt: a checkpoint, and a question with its pictures.
        methods: method specifications such as `fastv:layer=3`.
        batches: batch sizes, measured one by one.
    """

    shape: str | None = None
    num_layers: int | None = None
    visual_tokens: int | None = None
    text_tokens: int | None = None
    pictures: int | None = None
    padded: bool = False
    model: str | None = None
    images: Sequence[Path] = ()
    prompt: str | None = None
    methods: Sequence[str] = ()
    batches: Sequence[int] = (1,)
    threads: int = 1
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Bench:
    """A benchmark that is ready to run: the model in memory, with vanilla and the methods."""

    subject: Subject
    variants: Sequence[MethodCost]
    batches: Sequence[int]
    threads: int

    def generation(self, new_tokens: int, repeats: int, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Measure prefill, decoding, memory and KV cache of generating `new_tokens`, `repeats` times for each method;
        `tick` is called after each of :meth:`runs` runs."""

        def measure(batch: int, clock: Clock) -> list[Generation]:
            return measure_generation(self.subject, self.variants, batch, new_tokens, repeats, clock, tick)

        setting = {"new_tokens": new_tokens, "repeats": repeats}
        return self._timed("generation", setting, measure, generation_records)

    def training(
        self, repeats: int, optimizer: bool, tick: Callable[[], None] = lambda: None, lora_rank: int | None = None
    ) -> dict[str, Any]:
        """Measure training steps, with AdamW's update if `optimizer`, of adapters of rank `lora_rank` (None: of all
        weights); see :meth:`generation`."""
        variants = training_variants(self.variants)

        def measure(batch: int, clock: Clock) -> list[TrainingStep]:
            return measure_training(self.subject, variants, batch, repeats, clock, optimizer, tick, lora_rank)

        setting = {"optimizer": "AdamW" if optimizer else None, "repeats": repeats}
        lora = {} if lora_rank is None else {"lora_rank": lora_rank}
        return self._timed("training", {**setting, **lora}, measure, training_records)

    def decoding(
        self, new_tokens: int, repeats: int, compilers: Mapping[str, Compiler], tick: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Measure decode steps on a static cache with each of `compilers`; see :meth:`generation`."""

        def measure(batch: int, clock: Clock) -> list[Decoding]:
            return measure_decoding(self.subject, self.variants, batch, new_tokens, repeats, clock, compilers, tick)

        setting = {"new_tokens": new_tokens, "repeats": repeats}
        return self._timed("decoding", setting, measure, decoding_records)

    def overhead(self, repeats: int, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Count the operations of a prefill and a decode step, and time both; see :meth:`generation`."""

        def measure(batch: int, clock: Clock) -> list[Overhead]:
            return measure_overhead(self.subject, self.variants, batch, repeats, clock, tick)

        return self._timed("overhead", {"repeats": repeats}, measure, overhead_records)

    def graphs(
        self, visual_tokens: Sequence[int], backend: str, tick: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Count graphs of compiled layers over pictures with these `visual_tokens`; see :meth:`generation`."""
        with cpu_threads(self.threads):
            results = count_graphs(self.subject, self.variants, visual_tokens, backend, tick)
        setting = {"visual_tokens": list(visual_tokens), "backend": backend}
        return self._record("graphs", setting, list(map(asdict, results)))

    def runs(self, repeats: int, train: bool) -> int:
        """The number of runs, including the warm-up."""
        variants = len(training_variants(self.variants)) if train else len(self.variants)
        return variants * len(self.batches) * (repeats + 1)

    def _timed(
        self,
        kind: str,
        setting: dict[str, Any],
        measure: Callable[[int, Clock], list[Result]],
        records: Callable[[list[Result]], list[dict[str, Any]]],
    ) -> dict[str, Any]:
        """The record of what `measure` finds for each batch size."""
        clock = clock_for(self.subject.model.device, self.threads)
        with cpu_threads(self.threads), user_input("out of memory", (torch.OutOfMemoryError,)):
            results = [result for batch in self.batches for result in measure(batch, clock)]
        return self._record(kind, {**setting, "clock": clock.name}, records(results))

    def _record(self, kind: str, setting: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "kind": kind,
            "machine": machine(self.subject.model.device, self.threads),
            "subject": subject_record(self.subject),
            "setting": setting,
            "results": results,
        }


def prepare_bench(options: BenchOptions, tell: Callable[[str], None] = lambda reason: None) -> Bench:
    """Check the options, and load or make the model. Raises InputError if any option cannot be used.

    `tell` is called with the reason if a default method is left out.
    """
    device = pick_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "mps":
        raise InputError("bench measures on cpu and cuda; for mps PyTorch tells no peak memory")
    with cpu_threads(options.threads):
        subject = (
            _of_shape(options, options.shape, device) if options.shape is not None else _of_checkpoint(options, device)
        )
    variants = choose_variants(options.methods, subject.info.shape, subject.prompt, tell)
    return Bench(subject, variants, options.batches, options.threads)


def _of_shape(options: BenchOptions, shape: str, device: torch.device) -> Subject:
    for name, value in (("model", options.model), ("image", options.images), ("prompt", options.prompt)):
        if value:
            raise InputError(f"--{name} belongs to a checkpoint, and --shape runs random weights; give one of the two")
    sizes, _ = sizes_of(shape, options.num_layers)
    for variant in choose_variants(options.methods, sizes, Prompt(1)):  # before the weights are made
        parts = variant.method.parts if isinstance(variant.method, Compose) else (variant.method,)
        if any(part is not None and part.scorer().needs_vision_attention for part in parts):
            raise InputError(
                f"{variant.label} reads or changes what the vision tower sees, and --shape runs the decoder alone: "
                "take vision:score=diversity, random or uniform, or a checkpoint with --model"
            )
    text, pictures = options.text_tokens or TEXT_TOKENS, options.pictures or 1
    return shape_subject(
        shape, device, options.dtype, options.num_layers, options.visual_tokens, text, pictures, options.padded
    )


def _of_checkpoint(options: BenchOptions, device: torch.device) -> Subject:
    for name in ("num_layers", "visual_tokens", "text_tokens", "pictures", "padded"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} belongs to random weights; name their --shape")
    source = options.model or str(reader_checkpoint())
    config = read_config(source)
    with user_input(f"cannot count {source}"):
        shape = decoder_shape(config.get_text_config(decoder=True), 2)
    choose_variants(options.methods, shape, Prompt(1))  # before the weights are loaded
    images, prompt = tuple(options.images), options.prompt
    if options.model is None and not images:
        images = (demo_images()[0],)
        prompt = prompt or demo_questions()[images[0].name][0]["question"]
    request = Request(prompt or "Describe the image.", images, options.model, VANILLA, str(device), options.dtype)
    return checkpoint_subject(prepare(request))
