"""The output folder of an evaluation, and its journals: resumable results of the same model and questions."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import pyramiddrop
from pyramiddrop.evaluation.answering import Answerer, Reply
from pyramiddrop.evaluation.kept_places import Place
from pyramiddrop.evaluation.samples import PictureFiles, Sample
from pyramiddrop.inference import user_input
from pyramiddrop.inference.answer import usage_dict
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prefill_stats import StageTokens, Usage
from pyramiddrop.inference.timing import PrefillTime
from pyramiddrop.method_spec import VANILLA
from pyramiddrop.methods import Method
from pyramiddrop.speed.record import machine


def digest(parts: Iterable[bytes | str]) -> str:
    """A short hash of all `parts`."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


def key_digest(key: Mapping[str, Any]) -> str:
    """A short hash of plain values by name."""
    return digest([json.dumps(key, sort_keys=True)])


class Journal:
    """A file of JSON lines: the first line is the key, each later one an entry. Each key has its own file.

    Args:
        folder: the folder of the file.
        name: the readable beginning of its name.
        key: everything that the entries depend on, as plain values.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}-{key_digest(key)}.jsonl"
        self._head = _line(key)

    def entries(self) -> list[Any]:
        """The entries before the first broken line; none if the file does not begin with the key.

        Raises:
            InputError: if the file cannot be read.
        """
        if not self.path.exists():
            return []
        with user_input(f"cannot read {self.path}", (OSError,)):
            head, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        return _whole(lines) if head == self._head else []

    def keep(self, entries: Sequence[Any]) -> None:
        """Truncate the file to these entries, which are its first ones.

        Raises:
            InputError: if the file cannot be written.
        """
        with user_input(f"cannot write {self.path}", (OSError,)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            if lines[:1] != [self._head]:
                self.path.write_bytes(self._head)
            os.truncate(self.path, sum(map(len, lines[: 1 + len(entries)])) or len(self._head))

    def append(self, entries: Sequence[Any]) -> None:
        """Append entries and flush them to the disk; call `keep` before.

        Raises:
            InputError: if the file cannot be written.
        """
        with user_input(f"cannot write {self.path}", (OSError,)), self.path.open("ab") as file:
            file.write(b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())


class ReplyJournal(Journal):
    """The replies of one method."""

    def read(self, batch: int, total: int) -> list[Reply]:
        """The stored replies: all `total`, or those up to the last whole batch; the rest is truncated.

        An interrupted batch is answered again as a whole, so that its numbers equal those of an uninterrupted run to
        the last bit.

        Raises:
            InputError: if the file cannot be read or written.
        """
        replies = _replies(self.entries())
        if len(replies) < total:
            del replies[len(replies) // batch * batch :]
        self.keep(replies)
        return replies

    def append_replies(self, replies: Sequence[Reply]) -> None:
        """Append the replies of one batch.

        Raises:
            InputError: if the file cannot be written.
        """
        self.append([_reply_dict(reply) for reply in replies])


def _line(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True).encode() + b"\n"


def _whole(lines: Sequence[bytes]) -> list[Any]:
    """The lines before the first broken one."""
    found: list[Any] = []
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _replies(entries: Sequence[Any]) -> list[Reply]:
    """The replies before the first invalid entry."""
    found: list[Reply] = []
    for entry in entries:
        try:
            place = entry["place"] and Place(*entry["place"])
            found.append(Reply(entry["answer"], _usage(entry["usage"]), _usage(entry["vanilla"]), place))
        except (KeyError, TypeError):
            break
    return found


def _reply_dict(reply: Reply) -> dict[str, Any]:
    usages = {"usage": usage_dict(reply.usage), "vanilla": usage_dict(reply.vanilla)}
    return {"answer": reply.text, "place": reply.place, **usages}


def _usage(entry: Mapping[str, Any]) -> Usage:
    stages = tuple(StageTokens(**stage) for stage in entry["stages"])
    counts = {name: math.nan if entry[name] is None else entry[name] for name in ("flops", "kv_bytes")}
    return Usage(**{**entry, "stages": stages, **counts})


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
