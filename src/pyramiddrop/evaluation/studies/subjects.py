"""Owns what is studied, as a command line gives it: the samples, and the models by their names in the study."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.matching import MATCHES, Match
from pyramiddrop.evaluation.samples import Sample, digits_samples, read_samples
from pyramiddrop.hf import UnsupportedModelError, anatomy
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint, read_config
from pyramiddrop.inference.errors import InputError, user_input

BUNDLED = "bundled"
SCENES = 40


@dataclass(frozen=True)
class SampleOptions:
    """Which samples; None where nothing was said.

    Attributes:
        data, images: a file of samples and the folder of its pictures; without it the digits benchmark is asked.
        limit: only so many samples of the file.
        split, scenes, seed: of the digits benchmark.
    """

    data: Path | None = None
    images: Path | None = None
    limit: int | None = None
    split: str | None = None
    scenes: int | None = None
    seed: int | None = None

    def samples(self) -> list[Sample]:
        """The samples.

        Raises:
            InputError: for options that do not belong together, and for what cannot be read.
        """
        if self.data is None:
            if self.images is not None:
                raise InputError("--images belongs to --data: the digits benchmark draws its own pictures")
            return digits_samples(self.split or "test", self.scenes or SCENES, self.seed or 0)[: self.limit]
        given = [name for name in ("split", "scenes", "seed") if getattr(self, name) is not None]
        if given:
            raise InputError(f"--{given[0]} belongs to the digits benchmark, not to --data")
        return read_samples(self.data, self.images)[: self.limit]

    def about(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What was asked, in words and as a fingerprint of every question and answer."""
        text = repr([(one.question, one.answers, one.kind, one.cluster) for one in samples])
        drawn = f"digits, {self.split or 'test'} split, {self.scenes or SCENES} scenes, seed {self.seed or 0}"
        return {
            "data": drawn if self.data is None else str(self.data),
            "samples": len(samples),
            "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        }


@dataclass(frozen=True)
class Named:
    """A model that is studied: a folder or a name on the hub, or `bundled`; and its name in the study."""

    name: str
    source: str

    def load(self, device: str | None, dtype: str | None) -> Checkpoint:
        """Load it.

        Raises:
            InputError: where it cannot be loaded, or nothing can be dropped in it.
        """
        checkpoint = load_checkpoint(self._place, device, dtype)
        with user_input(caught=(UnsupportedModelError,)):
            anatomy(checkpoint.model)
        return checkpoint

    def check(self) -> None:
        """Raise InputError where there is no supported checkpoint, before any weights are read."""
        read_config(self._place)

    @property
    def _place(self) -> str | Path:
        return digits_checkpoint() if self.source == BUNDLED else self.source


def named_models(sources: Sequence[str], names: Sequence[str]) -> list[Named]:
    """The models of a study; without a name a model is called by the last part of its source.

    Raises:
        InputError: for not as many names as models, or two of the same.
    """
    sources = sources or [BUNDLED]
    if names and len(names) != len(sources):
        raise InputError(f"give one --name for each --model; got {len(names)} for {len(sources)}")
    found = [name.strip() for name in names] or [Path(source).name or source for source in sources]
    if len(set(found)) < len(found) or not all(found):
        raise InputError(f"models need different names (--name); got {', '.join(map(repr, found))}")
    return [Named(name, source) for name, source in zip(found, sources, strict=True)]


def named_match(name: str) -> Match:
    """What an answer scores; InputError for a name that is not one of MATCHES."""
    if name not in MATCHES:
        raise InputError(f"--match must be one of {', '.join(MATCHES)}; got {name!r}")
    return MATCHES[name]
