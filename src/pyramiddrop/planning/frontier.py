"""Owns the frontier of a redundancy profile: the schedules that no other one beats in both cost and predicted loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from pyramiddrop.planning.budget import Meter
from pyramiddrop.planning.profile import Profile
from pyramiddrop.schedule import Stage


@dataclass(frozen=True)
class Point:
    """A schedule: what it spends (before what is fixed), what it is predicted to lose, and its (layer, keep) drops."""

    amount: float
    loss: float
    drops: tuple[tuple[int, float], ...] = ()


def frontier(profile: Profile, meter: Meter) -> list[Point]:
    """All schedules on the profile's grid that none beats, cheapest first, the loss falling.

    Exact: cost and loss are sums over layers and drops, so of two ways to reach a layer with the same share kept, one
    that is worse in both can never become better.
    """
    tokens = {share: Stage(1, share).count(meter.tokens) for share in profile.keep}
    start = sum(meter.layer(layer, meter.tokens) for layer in range(profile.layers[0]))
    reached: dict[float, list[Point]] = {1.0: [Point(start, 0.0)]}
    for layer, following in pairwise([*profile.layers, meter.layers]):
        arriving: dict[float, list[Point]] = {share: [] for share in profile.keep}
        for before, points in reached.items():
            ranking = meter.ranking(tokens[before])
            for after in profile.keep:
                if after == before:
                    arriving[after] += points
                elif tokens[after] < tokens[before]:
                    loss = profile.loss(layer, before, after)
                    arriving[after] += [
                        Point(point.amount + ranking, point.loss + loss, (*point.drops, (layer, after)))
                        for point in points
                    ]
        reached = {}
        for share, points in arriving.items():
            segment = sum(meter.layer(index, tokens[share]) for index in range(layer, following))
            reached[share] = [Point(one.amount + segment, one.loss, one.drops) for one in _unbeaten(points)]
    return _unbeaten(point for points in reached.values() for point in points)


def _unbeaten(points: Iterable[Point]) -> list[Point]:
    """Those that are cheaper than all with a smaller loss; of equals, the one with fewer drops."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.amount, one.loss, len(one.drops))):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found
