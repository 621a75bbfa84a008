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
    """The output folder.

    Attributes:
        shared: the part of all keys that does not depend on a method, as plain values.
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
        """The journal of the replies under `method`."""
        name = VANILLA if method is None else type(method).__name__
        return ReplyJournal(self.folder / "replies", name, {**self.shared, "method": _settings(method)})

    def times(self, methods: Sequence[Method | None], measure: Callable[[], Times]) -> Times:
        """The times of these methods: stored ones from the same kind of machine, or else measured now."""
        key = {**self.shared, "machine": self._machine, "methods": [_settings(method) for method in methods]}
        path = self.folder / f"prefill-{key_digest(key)}.json"
        if path.exists():
            with user_input(f"cannot read {path}", (OSError, ValueError, TypeError)):
                return [PrefillTime(**entry) for entry in json.loads(path.read_text("utf-8"))]
        found = measure()
        write_json(path, [asdict(one) for one in found])
        return found


def write_json(path: Path, values: Any) -> None:
    """Write plain values atomically.

    Raises:
        InputError: if the file cannot be written.
    """
    with user_input(f"cannot write {path}", (OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        part.replace(path)


def _settings(method: Method | None) -> Mapping[str, Any]:
    return {} if method is None else method.settings()


#: Sampled values of each weight tensor: training changes almost all of them, and reading all of 7B takes minutes.
PROBES = 256


def model_digest(checkpoint: Checkpoint) -> str:
    """A hash of the configuration, evenly spaced values of every weight, dtype, device and processor.

    It does not depend on the path of the checkpoint.
    """
    return digest(_model_parts(checkpoint))


def samples_digest(samples: Sequence[Sample]) -> str:
    """A hash of questions and pictures in their order, without the right answers, which no model sees."""
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
