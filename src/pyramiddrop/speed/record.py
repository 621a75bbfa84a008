"""Records of measurements as plain values: the machine, the settings and the results."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

import pyramiddrop
from pyramiddrop.method_spec import VANILLA
from pyramiddrop.speed.decoding import Decoding
from pyramiddrop.speed.generation import Generation
from pyramiddrop.speed.memory import total_memory
from pyramiddrop.speed.overhead import Graphs, Overhead
from pyramiddrop.speed.subject import Subject
from pyramiddrop.speed.training import TrainingStep


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
    shape = subject.info.shape
    return {
        "name": subject.name,
        "about": subject.about,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "attention": subject.info.attention,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocabulary": shape.vocabulary,
        "visual_tokens": subject.prompt.visual_tokens,
        "text_tokens": subject.prompt.text_tokens,
        "pictures": subject.pictures,
        "padded": subject.padded,
    }


def generation_records(results: Sequence[Generation]) -> list[dict[str, Any]]:
    """Each result in seconds, bytes and FLOPs, with its ratios to vanilla of the same batch.

    `of_predicted` is the decoder's speed-up in the prefill divided by the speed-up in FLOPs; `dropping_share` is the
    share of a method's hooks in its own prefill.
    """
    vanilla = {result.batch: result for result in results if result.variant == VANILLA}
    return [_generation(result, vanilla[result.batch]) for result in results]


def training_records(results: Sequence[TrainingStep]) -> list[dict[str, Any]]:
    """Each result with its ratios to vanilla of the same batch and checkpointing."""
    vanilla = {(result.batch, result.checkpointing): result for result in results if result.variant == VANILLA}
    return [_training(result, vanilla[result.batch, result.checkpointing]) for result in results]


def decoding_records(results: Sequence[Decoding]) -> list[dict[str, Any]]:
    """Each result with its ratio to vanilla of the same batch and compiler."""
    vanilla = {(result.batch, result.compiled): result.step.median for result in results if result.variant == VANILLA}
    return [
        {
            **_rounded(asdict(result)),
            "tokens_per_second": result.batch / result.step.median,
            "ratios": {"step": result.step.median / vanilla[result.batch, result.compiled]},
        }
        for result in results
    ]


def overhead_records(results: Sequence[Overhead]) -> list[dict[str, Any]]:
    """Each result with the operations that it adds to vanilla of the same batch, and ratios of seconds."""
    vanilla = {result.batch: result for result in results if result.variant == VANILLA}
    return [
        {
            **_rounded(asdict(result)),
            "added": {
                "prefill_ops": result.prefill_ops - vanilla[result.batch].prefill_ops,
                "step_ops": result.step_ops - vanilla[result.batch].step_ops,
            },
            "ratios": {
                "prefill": result.prefill.median / vanilla[result.batch].prefill.median,
                "step": result.step.median / vanilla[result.batch].step.median,
            },
        }
        for result in results
    ]


def graph_records(results: Sequence[Graphs]) -> list[dict[str, Any]]:
    """Each result as plain numbers."""
    return [asdict(result) for result in results]


def _generation(result: Generation, vanilla: Generation) -> dict[str, Any]:
    flops_ratio = result.predicted.flops / vanilla.predicted.flops
    decoder_ratio = result.decoder.median / vanilla.decoder.median
    return {
        **_rounded(asdict(result)),
        "tokens_per_second": result.batch / result.step.median if result.step else None,
        "ratios": {
            "flops": flops_ratio,
            "causal_flops": result.predicted.causal_flops / vanilla.predicted.causal_flops,
            "decoder": decoder_ratio,
            "first_token": result.first_token.median / vanilla.first_token.median,
            "step": result.step.median / vanilla.step.median if result.step and vanilla.step else None,
            "whole": result.whole.median / vanilla.whole.median,
            "peak_bytes": result.peak_bytes / vanilla.peak_bytes,
            "kv_bytes": result.kv_bytes / vanilla.kv_bytes,
        },
        "of_predicted": flops_ratio / decoder_ratio,
        "dropping_share": result.dropping.median / result.first_token.median,
    }


def _training(result: TrainingStep, vanilla: TrainingStep) -> dict[str, Any]:
    return {
        **_rounded(asdict(result)),
        "ratios": {
            "flops": result.predicted_flops / vanilla.predicted_flops,
            "gradients": result.gradients.median / vanilla.gradients.median,
            "whole": result.whole.median / vanilla.whole.median,
            "peak_bytes": result.peak_bytes / vanilla.peak_bytes,
        },
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Round seconds to the microsecond, so that files are readable."""
    return {name: _round(value) for name, value in values.items()}


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return _rounded(value)
    return [_round(one) for one in value] if isinstance(value, tuple) else value
