"""The grid of a redundancy study: the layers before which a single drop is tried, and its keep ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyramiddrop import PyramidDrop
from pyramiddrop.hf.model_info import ModelInfo, check_layers, drop_layers
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.scoring import AttentionScorer

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
