"""The models of a study, as the command line gives them."""

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
    """A model that is studied: a folder or a name on the hub, or `bundled`; and its name in the study.

    `bundled` is the folder of the bundled model.
    """

    name: str
    source: str
    bundled: Path

    def check(self) -> None:
        """Raise InputError where there is no supported checkpoint, before any weights are read."""
        read_config(self._place)

    def load(self, device: str | None, dtype: str | None) -> Checkpoint:
        """Load it.

        Raises:
            InputError: where it cannot be loaded, or nothing can be dropped in it.
        """
        checkpoint = load_checkpoint(self._place, device, dtype)
        with user_input(caught=(UnsupportedModelError,)):
            inspect_model(checkpoint.model)
        return checkpoint

    @property
    def _place(self) -> str | Path:
        return self.bundled if self.source == BUNDLED else self.source


def study_models(sources: Sequence[str], names: Sequence[str], bundled: Path) -> list[StudyModel]:
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
    return [StudyModel(name, source, bundled) for name, source in zip(found, sources, strict=True)]
