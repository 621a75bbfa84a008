"""The grid of a redundancy study: the layers before which one drop is tried, and its keep ratios."""

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
    """0-based `layers`, ascending, and shares of the visual tokens to `keep`, descending."""

    layers: tuple[int, ...]
    keep: tuple[float, ...]

    @property
    def cells(self) -> list[tuple[int, float]]:
        """Every (layer, keep), layer by layer."""
        return [(layer, keep) for layer in self.layers for keep in self.keep]


def single_drop(layer: int, keep: float) -> PyramidDrop:
    """One drop before `layer`, ranked by that layer as PyramidDrop ranks."""
    return PyramidDrop(layers=[layer], keep=[keep])


def make_grid(info: ModelInfo, layers: Sequence[int] | None = None, keep: Sequence[float] | None = None) -> Grid:
    """The grid for one model: what the user gave, or else `usual_layers` and a half down to a sixty-fourth.

    Raises:
        InputError: for a layer that the model does not have or at which it cannot drop, or a share that is not in
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
    """Each eighth of the depth and its sixteenth, as far as they are `allowed`: of 32 layers 2, 4, 8, 12, ..., 28.

    Those of the paper's Figure 3 (2, 8, 16, 24) are among them.
    """
    wanted = {depth // 16, *(depth * eighth // 8 for eighth in range(1, 8))}
    return tuple(sorted(wanted & set(allowed))) or tuple(allowed)
