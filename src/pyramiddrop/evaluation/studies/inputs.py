"""The inputs of a study: its models, and the grid of layers and keep ratios at which a single drop is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyramiddrop import PyramidDrop
from pyramiddrop.hf import UnsupportedModelError, inspect_model
from pyramiddrop.hf.model_info import ModelInfo, check_layers, drop_layers
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint, read_config
from pyramiddrop.scoring import AttentionScorer

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


DEFAULT_KEEP = (0.5, 0.25, 0.125, 1 / 64)


@dataclass(frozen=True)
class Grid:
    """0-based `layers`, ascending, and keep ratios `keep`, descending."""

    layers: tuple[int, ...]
    keep: tuple[float, ...]

    @property
    def cells(self) -> list[tuple[int, float]]:
        """All (layer, keep), layer by layer."""
        return [(layer, keep) for layer in self.layers for keep in self.keep]


def single_drop(layer: int, keep: float) -> PyramidDrop:
    """PyramidDrop with a single drop before `layer`."""
    return PyramidDrop(layers=[layer], keep=[keep])


def make_grid(info: ModelInfo, layers: Sequence[int] | None = None, keep: Sequence[float] | None = None) -> Grid:
    """The grid for a model: the user's values, or else `usual_layers` and keep ratios from 1/2 to 1/64.

    Raises:
        InputError: for a layer that the model does not have or before which it cannot drop, or a keep ratio outside
            (0, 1].
    """
    allowed, depth = drop_layers(info, "next", AttentionScorer()), len(info.layers)
    chosen = usual_layers(depth, allowed) if layers is None else tuple(sorted(set(layers)))
    shares = tuple(sorted(set(DEFAULT_KEEP if keep is None else keep), reverse=True))
    if not chosen or not shares:
        raise InputError("the grid needs at least one layer and one share")
    if shares[-1] == 0:
        raise InputError("keep must be in (0, 1]: at 0 no token is chosen, and the study is about the choice; got 0")
    for layer in chosen:
        for share in shares:
            with user_input():
                single_drop(layer, share).schedule(depth)
    with user_input():
        check_layers(info, chosen, "next", AttentionScorer())
    return Grid(chosen, shares)


def usual_layers(depth: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """The eighths of the depth and its sixteenth, if `allowed`: 2, 4, 8, 12, ..., 28 of 32 layers.

    They include those of the paper's Figure 3 (2, 8, 16, 24).
    """
    wanted = {depth // 16, *(depth * eighth // 8 for eighth in range(1, 8))}
    return tuple(sorted(wanted & set(allowed))) or tuple(allowed)
