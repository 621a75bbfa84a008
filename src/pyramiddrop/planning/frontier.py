"""The Pareto frontier of a redundancy profile: schedules that are best in cost or predicted loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from pyramiddrop.planning.budget import Meter
from pyramiddrop.planning.profile import Profile
from pyramiddrop.schedule import Stage

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
