"""The redundancy profile (a model's loss after a single drop, by layer and keep ratio) and its Pareto frontier."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeVar

from pyramiddrop.planning.budget import Meter
from pyramiddrop.schedule import Stage

Built = TypeVar("Built")

METRICS = ("agreement", "accuracy")


@dataclass(frozen=True)
class Profile:
    """The loss of a single drop, on a full grid of layers and shares.

    Attributes:
        num_layers: the model's decoder layers.
        layers: 0-based layers of the drop, ascending.
        keep: keep ratios of the original visual tokens, descending, from 1 (no loss).
        losses: by (layer, keep), the score below vanilla's; never negative, and never smaller for a smaller keep ratio,
            so that measurement noise has no advantage.
    """

    num_layers: int
    layers: tuple[int, ...]
    keep: tuple[float, ...]
    losses: Mapping[tuple[int, float], float]

    def loss(self, layer: int, before: float, after: float) -> float:
        """The loss of a drop before `layer` from keep ratio `before` to `after`."""
        return self.losses[layer, after] - self.losses[layer, before]

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Read a JSON file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is not a profile; the message says why.
        """
        return read_json(path, cls.from_dict, "redundancy profile")

    @classmethod
    def from_dict(cls, found: Any) -> Profile:
        """Make a profile of `{"num_layers": 32, "vanilla": 0.67, "cells": [{"layer": 8, "keep": 0.5, "accuracy": 0.66},
        ...]}`.

        A cell is a single drop before `layer` to the keep ratio `keep`, with the model's score: `accuracy`, or
        `agreement` with vanilla's answers (then `vanilla` is 1 and may be omitted).

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        if not isinstance(found, dict):
            raise ValueError(f"it must be a JSON object; got {type(found).__name__}")
        num_layers, cells = found["num_layers"], found["cells"]
        if not cells:
            raise ValueError("it has no cells")
        metric = next((name for name in METRICS if name in cells[0]), None)
        if metric is None:
            raise ValueError(f"a cell needs {' or '.join(METRICS)}; got {cells[0]}")
        vanilla = found.get("vanilla", 1.0) if metric == "agreement" else found["vanilla"]
        scores = {(cell["layer"], float(cell["keep"])): float(cell[metric]) for cell in cells}
        layers = sorted({layer for layer, _ in scores})
        keep = sorted({share for _, share in scores} - {1.0}, reverse=True)
        if any(not isinstance(layer, int) or not 1 <= layer < num_layers for layer in layers):
            raise ValueError(f"layers must be in 1..{num_layers - 1}; got {layers}")
        if not keep or not 0 < keep[-1] <= keep[0] < 1:
            raise ValueError(f"keep must be in (0, 1]; got {keep}")
        for layer, share in product(layers, keep):
            if (layer, share) not in scores:
                raise ValueError(f"every layer needs every keep; layer {layer} has none for keep {share:g}")
        losses: dict[tuple[int, float], float] = {}
        for layer in layers:
            worst = losses[layer, 1.0] = 0.0
            for share in keep:
                worst = losses[layer, share] = max(worst, vanilla - scores[layer, share])
        return cls(num_layers, tuple(layers), (1.0, *keep), losses)


def read_json(path: str | Path, build: Callable[[Any], Built], what: str) -> Built:
    """Build an object from the content of a JSON file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if `build` refuses its content; the message says that the file is no `what`, and why.
    """
    try:
        return build(json.loads(Path(path).read_text("utf-8")))
    except (TypeError, KeyError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no {what}: {reason}") from error


#: What the cost of later layers depends on: the keep ratio, and the visual tokens in each earlier layer whose keys a
#: later one attends to.
State = tuple[float, tuple[int, ...]]


@dataclass(frozen=True)
class Point:
    """A schedule: its cost (without the fixed cost), its predicted loss, and its (layer, keep) drops."""

    amount: float
    loss: float
    drops: tuple[tuple[int, float], ...] = ()


def frontier(profile: Profile, meter: Meter) -> list[Point]:
    """All Pareto-optimal schedules on the profile's grid, by increasing cost and decreasing loss.

    The result is exact: cost and loss are sums over layers and drops, so that of two schedules that reach a layer in
    the same state, one that is worse in both stays worse.
    """
    tokens = {share: Stage(1, share).count(meter.tokens) for share in profile.keep}
    shared = sorted({source for layer, source in enumerate(meter.sources) if source != layer})

    def through(first: int, end: int, share: float, held: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        """The cost of the layers from `first` to `end`, and the visual tokens in shared layers after them."""
        spent, here = 0.0, tokens[share]
        for layer in range(first, end):
            source = meter.sources[layer]
            spent += meter.layer(layer, here, here if source == layer else held[shared.index(source)])
            held = (*held, here) if layer in shared else held
        return spent, held

    start, held = through(0, profile.layers[0], 1.0, ())
    reached: dict[State, list[Point]] = {(1.0, held): [Point(start, 0.0)]}
    for layer, following in pairwise([*profile.layers, meter.layers]):
        arriving: dict[State, list[Point]] = {}
        for (before, held), points in reached.items():
            ranking = meter.ranking(tokens[before])
            arriving.setdefault((before, held), []).extend(points)
            for after in (share for share in profile.keep if tokens[share] < tokens[before]):
                loss = profile.loss(layer, before, after)
                arriving.setdefault((after, held), []).extend(
                    Point(point.amount + ranking, point.loss + loss, (*point.drops, (layer, after))) for point in points
                )
        reached = {}
        for (share, held), points in arriving.items():
            segment, then = through(layer, following, share, held)
            passed = [Point(one.amount + segment, one.loss, one.drops) for one in _unbeaten(points)]
            reached.setdefault((share, then), []).extend(passed)
    return _unbeaten(point for points in reached.values() for point in points)


def _unbeaten(points: Iterable[Point]) -> list[Point]:
    """The points that are cheaper than all points with a smaller loss; of equal ones, that with fewer drops."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.amount, one.loss, len(one.drops))):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found
