"""Fingerprints of models and samples, which tell whether saved answers still hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pyramiddrop.evaluation.samples import PictureFiles, Sample
from pyramiddrop.inference.checkpoint import Checkpoint

#: Values of each weight tensor that are looked at: training changes nearly all, and reading all of 7B takes minutes.
PROBES = 256


def digest(parts: Iterable[bytes | str]) -> str:
    """A short name for `parts`, each of which counts."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


def key_digest(key: Mapping[str, Any]) -> str:
    """The same for plain values by name."""
    return digest([json.dumps(key, sort_keys=True)])


def model_digest(checkpoint: Checkpoint) -> str:
    """Of the configuration, of evenly spaced values of every weight, of the dtype and the device, and of the processor.

    It does not depend on where the checkpoint lies.
    """
    return digest(_model_parts(checkpoint))


def samples_digest(samples: Sequence[Sample]) -> str:
    """Of questions and pictures, in their order. The right answers do not matter: no model sees them."""
    return digest(part for sample in samples for part in _sample_parts(sample))


def _model_parts(checkpoint: Checkpoint) -> Iterable[bytes | str]:
    model, processor = checkpoint.model, checkpoint.processor
    yield from (model.config.to_json_string(), model.device.type)
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()
        probes = values[:: max(1, -(-len(values) // PROBES))]
        yield f"{name} {tuple(weight.shape)} {weight.dtype}"
        yield probes.to("cpu", torch.float32).numpy().tobytes()
    yield str(getattr(processor, "chat_template", None))
    images = getattr(processor, "image_processor", None)
    yield images.to_json_string() if images is not None else ""


def _sample_parts(sample: Sample) -> Iterable[bytes | str]:
    yield sample.question
    if isinstance(sample.images, PictureFiles):
        yield from (file.read_bytes() for file in sample.images.files)
    else:
        yield from (part for image in sample.images for part in (f"{image.mode} {image.size}", image.tobytes()))
