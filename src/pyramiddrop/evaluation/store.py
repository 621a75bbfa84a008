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
from pyramiddrop.evaluation.answering import Answerer, Place, Reply
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


def _key_digest(key: Mapping[str, Any]) -> str:
    return digest([json.dumps(key, sort_keys=True)])


class Journal:
    """A file of JSON lines: the first line is the key, each later one an entry. InputError if it cannot be used.

    The key is everything that the entries depend on, as plain values. Each key has its own file, named after `name`.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}-{_key_digest(key)}.jsonl"
        self._head = _line(key)

    def entries(self) -> list[Any]:
        """The entries before the first broken line; none if the file does not begin with the key."""
        with user_input(f"cannot read {self.path}", (OSError,)):
            head, *lines = self._lines() or [b""]
        found: list[Any] = []
        for line in lines if head == self._head else ():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            found.append(entry)
        return found

    def keep(self, entries: Sequence[Any]) -> None:
        """Truncate the file to these entries, which are its first ones."""
        with user_input(f"cannot write {self.path}", (OSError,)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._lines()
            if lines[:1] != [self._head]:
                self.path.write_bytes(self._head)
            os.truncate(self.path, sum(map(len, lines[: 1 + len(entries)])) or len(self._head))

    def append(self, entries: Sequence[Any]) -> None:
        """Append entries and flush them to the disk; call `keep` before."""
        with user_input(f"cannot write {self.path}", (OSError,)), self.path.open("ab") as file:
            file.write(b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []


class ReplyJournal(Journal):
    """The replies of one method."""

    def read(self, batch: int, total: int) -> list[Reply]:
        """The stored replies: all `total`, or those up to the last whole batch; the rest is truncated.

        An interrupted batch is answered again as a whole, so that its numbers equal those of an uninterrupted run to
        the last bit.
        """
        replies: list[Reply] = []
        for entry in self.entries():
            try:
                place = entry["place"] and Place(*entry["place"])
                replies.append(Reply(entry["answer"], _usage(entry["usage"]), _usage(entry["vanilla"]), place))
            except (KeyError, TypeError):  # the first invalid entry
                break
        if len(replies) < total:
            del replies[len(replies) // batch * batch :]
        self.keep(replies)
        return replies

    def append_replies(self, replies: Sequence[Reply]) -> None:
        """Append the replies of one batch."""
        told = [{"answer": reply.text, "place": reply.place} for reply in replies]
        costs = [{"usage": usage_dict(reply.usage), "vanilla": usage_dict(reply.vanilla)} for reply in replies]
        self.append([answer | cost for answer, cost in zip(told, costs, strict=True)])


def _line(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True).encode() + b"\n"


def _usage(entry: Mapping[str, Any]) -> Usage:
    stages = tuple(StageTokens(**stage) for stage in entry["stages"])
    counts = {name: math.nan if entry[name] is None else entry[name] for name in ("flops", "kv_bytes")}
    return Usage(**{**entry, "stages": stages, **counts})


Times = list[PrefillTime]


class Store:
    """The output folder; `shared` is the part of all keys that does not depend on a method, as plain values."""

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
        key = {**self.shared, "method": _settings(method)}
        return ReplyJournal(self.folder / "replies", variant_name(method), key)

    def times(self, methods: Sequence[Method | None], measure: Callable[[], Times]) -> Times:
        """The times of these methods: stored ones from the same kind of machine, or else measured now."""
        key = {**self.shared, "machine": self._machine, "methods": [_settings(method) for method in methods]}
        path = self.folder / f"prefill-{_key_digest(key)}.json"
        if path.exists():
            with user_input(f"cannot read {path}", (OSError, ValueError, TypeError)):
                return [PrefillTime(**entry) for entry in json.loads(path.read_text("utf-8"))]
        found = measure()
        write_json(path, [asdict(one) for one in found])
        return found


def write_json(path: Path, values: Any) -> None:
    """Write plain values atomically; InputError if the file cannot be written."""
    with user_input(f"cannot write {path}", (OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        part.replace(path)


def variant_name(method: Method | None) -> str:
    """The name of a method's class."""
    return VANILLA if method is None else type(method).__name__


def _settings(method: Method | None) -> Mapping[str, Any]:
    return {} if method is None else method.settings()


#: Sampled values of each weight tensor: training changes almost all of them, and reading all of 7B takes minutes.
PROBES = 256


def model_digest(checkpoint: Checkpoint) -> str:
    """A hash of configuration, evenly spaced values of every weight, dtype, device and processor, not of the path."""
    model, processor = checkpoint.model, checkpoint.processor
    parts: list[bytes | str] = [model.config.to_json_string(), model.device.type]
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()
        probes = values[:: max(1, -(-len(values) // PROBES))]
        parts += [f"{name} {tuple(weight.shape)} {weight.dtype}", probes.to("cpu", torch.float32).numpy().tobytes()]
    images = getattr(processor, "image_processor", None)
    parts += [str(getattr(processor, "chat_template", None)), images.to_json_string() if images is not None else ""]
    return digest(parts)


def samples_digest(samples: Sequence[Sample]) -> str:
    """A hash of questions and pictures in their order, without the right answers, which no model sees."""

    def parts() -> Iterable[bytes | str]:
        for sample in samples:
            yield sample.question
            if isinstance(sample.images, PictureFiles):
                yield from (file.read_bytes() for file in sample.images.files)
            else:
                yield from (part for image in sample.images for part in (f"{image.mode} {image.size}", image.tobytes()))

    return digest(parts())
