"""The output folder of an evaluation: keeps replies and times of the same model, questions and versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import pyramiddrop
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.journal import ReplyJournal, digest, key_digest
from pyramiddrop.evaluation.samples import PictureFiles, Sample
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.errors import user_input
from pyramiddrop.inference.timing import PrefillTime
from pyramiddrop.method_spec import VANILLA
from pyramiddrop.methods import Method
from pyramiddrop.speed.record import machine

Times = list[PrefillTime]


class Store:
    """The folder.

    Attributes:
        shared: the part of every key that does not depend on a method, as plain values.
    """

    def __init__(self, folder: Path, answerer: Answerer, samples: Sequence[Sample]) -> None:
        self.folder = folder
        self._machine = machine(answerer.checkpoint.model.device, torch.get_num_threads())
        self.shared = {
            "model": model_digest(answerer.checkpoint),
            "samples": samples_digest(samples),
            "batch": answerer.batch,
            "max_new_tokens": answerer.max_new_tokens,
            "versions": [pyramiddrop.__version__, transformers.__version__, torch.__version__],
        }

    def journal(self, method: Method | None) -> ReplyJournal:
        """Where the replies under `method` are kept."""
        name = VANILLA if method is None else type(method).__name__
        return ReplyJournal(self.folder / "replies", name, {**self.shared, "method": _settings(method)})

    def times(self, methods: Sequence[Method | None], measure: Callable[[], Times]) -> Times:
        """The times that were measured of the same methods on the same kind of machine before, or else now."""
        key = {**self.shared, "machine": self._machine, "methods": [_settings(method) for method in methods]}
        path = self.folder / f"prefill-{key_digest(key)}.json"
        if path.exists():
            with user_input(f"cannot read {path}", (OSError, ValueError, TypeError)):
                return [PrefillTime(**entry) for entry in json.loads(path.read_text("utf-8"))]
        found = measure()
        write_json(path, [asdict(one) for one in found])
        return found


def write_json(path: Path, values: Any) -> None:
    """Write plain values, whole or not at all.

    Raises:
        InputError: where that cannot be.
    """
    with user_input(f"cannot write {path}", (OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        part.replace(path)


def _settings(method: Method | None) -> Mapping[str, Any]:
    return {} if method is None else method.settings()


#: Values of each weight tensor that are looked at: training changes nearly all, and reading all of 7B takes minutes.
PROBES = 256


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
