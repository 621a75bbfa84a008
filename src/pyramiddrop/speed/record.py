"""Records of measurements as plain values: the machine, the settings and the results."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any, TypeVar

import torch
import transformers

import pyramiddrop
from pyramiddrop.inference.timing import Spread
from pyramiddrop.method_spec import VANILLA
from pyramiddrop.planning.measured import SIZES, TOKENS
from pyramiddrop.speed.generation import Decoding, Generation
from pyramiddrop.speed.memory import total_memory
from pyramiddrop.speed.overhead import Overhead
from pyramiddrop.speed.subject import Subject
from pyramiddrop.speed.training import TrainingStep

Result = TypeVar("Result", Generation, TrainingStep, Decoding, Overhead)


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """The kind of processor or GPU, and versions; nothing that identifies the individual machine."""
    on_gpu = device.type == "cuda"
    return {
        "architecture": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "device_bytes": total_memory(device) if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyramiddrop": pyramiddrop.__version__,
    }


def subject_record(subject: Subject) -> dict[str, Any]:
    """The sizes of the model and the prompt."""
    return {
        "name": subject.name,
        "about": subject.about,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "attention": subject.info.attention,
        **{name: getattr(subject.info.shape, name) for name in (*SIZES, "vocabulary")},
        **{name: getattr(subject.prompt, name) for name in TOKENS},
        "pictures": subject.pictures,
        "padded": subject.padded,
    }


def generation_records(results: Sequence[Generation]) -> list[dict[str, Any]]:
    """Each result in seconds, bytes and FLOPs, with its ratios to vanilla of the same batch.

    `of_predicted` is the decoder's speed-up in the prefill divided by the speed-up in FLOPs; `dropping_share` is the
    share of a method's hooks in its own prefill.
    """
    records = []
    for result, vanilla in _beside_vanilla(results, "batch"):
        ratios = {
            **_ratios(result.predicted, vanilla.predicted, "flops", "causal_flops"),
            **_ratios(result, vanilla, "decoder", "first_token", "step", "whole", "peak_bytes", "kv_bytes"),
        }
        record = {
            **_rounded(asdict(result)),
            "tokens_per_second": result.batch / result.step.median if result.step else None,
            "ratios": ratios,
            "of_predicted": ratios["flops"] / ratios["decoder"],
            "dropping_share": result.dropping.median / result.first_token.median,
        }
        records.append(record)
    return records


def training_records(results: Sequence[TrainingStep]) -> list[dict[str, Any]]:
    """Each result with its ratios to vanilla of the same batch and checkpointing."""
    records = []
    for result, vanilla in _beside_vanilla(results, "batch", "checkpointing"):
        flops = result.predicted_flops / vanilla.predicted_flops
        ratios = {"flops": flops, **_ratios(result, vanilla, "gradients", "whole", "peak_bytes")}
        records.append({**_rounded(asdict(result)), "ratios": ratios})
    return records


def decoding_records(results: Sequence[Decoding]) -> list[dict[str, Any]]:
    """Each result with its ratio to vanilla of the same batch and compiler."""
    return [
        {
            **_rounded(asdict(result)),
            "tokens_per_second": result.batch / result.step.median,
            "ratios": _ratios(result, vanilla, "step"),
        }
        for result, vanilla in _beside_vanilla(results, "batch", "compiled")
    ]


def overhead_records(results: Sequence[Overhead]) -> list[dict[str, Any]]:
    """Each result with the operations that it adds to vanilla of the same batch, and ratios of seconds."""
    return [
        {
            **_rounded(asdict(result)),
            "added": {name: getattr(result, name) - getattr(vanilla, name) for name in ("prefill_ops", "step_ops")},
            "ratios": _ratios(result, vanilla, "prefill", "step"),
        }
        for result, vanilla in _beside_vanilla(results, "batch")
    ]


def _beside_vanilla(results: Sequence[Result], *same: str) -> list[tuple[Result, Result]]:
    """Each result with vanilla's that has the `same` attributes."""
    key = attrgetter(*same)
    vanilla = {key(result): result for result in results if result.variant == VANILLA}
    return [(result, vanilla[key(result)]) for result in results]


def _ratios(result: Any, vanilla: Any, *names: str) -> dict[str, Any]:
    """The shares of vanilla's numbers and medians; None if there is none."""

    def number(value: Any) -> Any:
        return value.median if isinstance(value, Spread) else value

    pairs = {name: (number(getattr(result, name)), number(getattr(vanilla, name))) for name in names}
    return {name: None if None in pair else pair[0] / pair[1] for name, pair in pairs.items()}


def _rounded(value: Any) -> Any:
    """Round seconds to the microsecond, so that files are readable."""
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value
