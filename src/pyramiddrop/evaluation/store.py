"""The output folder of an evaluation: keeps replies and times of the same model, questions and versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import pyramiddrop
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.fingerprint import key_digest, model_digest, samples_digest
from pyramiddrop.evaluation.journal import ReplyJournal
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.inference.choice import VANILLA
from pyramiddrop.inference.errors import user_input
from pyramiddrop.inference.timing import PrefillTime
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
