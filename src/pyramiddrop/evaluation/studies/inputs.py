"""The models of a study, from the command line's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyramiddrop.hf import UnsupportedModelError, inspect_model
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint, read_config
from pyramiddrop.inference.errors import InputError, user_input

BUNDLED = "bundled"


@dataclass(frozen=True)
class StudyModel:
    """A model of a study: its source (a folder, a name on the hub, or "bundled") and its name in the study.

    `bundled` is the folder of the bundled model.
    """

    name: str
    source: str
    bundled: Path

    def check(self) -> None:
        """Raise InputError if there is no supported checkpoint, without reading weights."""
        read_config(self._place)

    def load(self, device: str | None, dtype: str | None) -> Checkpoint:
        """Load the checkpoint.

        Raises:
            InputError: if it cannot be loaded, or its tokens cannot be dropped.
        """
        checkpoint = load_checkpoint(self._place, device, dtype)
        with user_input(caught=(UnsupportedModelError,)):
            inspect_model(checkpoint.model)
        return checkpoint

    @property
    def _place(self) -> str | Path:
        return self.bundled if self.source == BUNDLED else self.source


def study_models(sources: Sequence[str], names: Sequence[str], bundled: Path) -> list[StudyModel]:
    """The models of a study; by default, a model is named by the last part of its source.

    Raises:
        InputError: if there are not as many names as models, or two are equal.
    """
    sources = sources or [BUNDLED]
    if names and len(names) != len(sources):
        raise InputError(f"give one --name for each --model; got {len(names)} for {len(sources)}")
    found = [name.strip() for name in names] or [Path(source).name or source for source in sources]
    if len(set(found)) < len(found) or not all(found):
        raise InputError(f"models need different names (--name); got {', '.join(map(repr, found))}")
    return [StudyModel(name, source, bundled) for name, source in zip(found, sources, strict=True)]
