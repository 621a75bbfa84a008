"""Statistics of answers: means with errors clustered by picture, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

#: Bootstrap draws: the ends of a 95 % interval then vary by about a thirtieth of the standard error.
DRAWS = 10_000
LEVEL = 0.95
#: Numbers drawn at once, so that memory does not grow with the benchmark.
AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Score:
    """A mean and its standard error in 0..1, over `count` questions."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain values, with None for NaN, which JSON does not have."""
        return {name: None if math.isnan(number) else number for name, number in asdict(self).items()}

    def signed(self) -> str:
        """The score with its sign, for differences."""
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class Difference(Score):
    """A paired difference, with its 95 % bootstrap interval from `low` to `high`."""

    low: float
    high: float


def score(values: ArrayLike, clusters: ArrayLike) -> Score:
    """The mean of `values` (N,) over all questions, with an error clustered by `clusters`.

    The error is the cluster-robust one of a mean, with the usual correction g / (g - 1) for g clusters. It is NaN for a
    single cluster. ValueError if there are no values, or not as many clusters.

    Args:
        clusters: (N,) labels that are equal for questions that are not independent, such as those of one picture.
    """
    sums, counts = _cluster_sums(values, clusters)
    mean = sums.sum() / counts.sum()
    residuals, groups = sums - counts * mean, len(sums)
    error = np.sqrt(groups / (groups - 1) * (residuals**2).sum()) / counts.sum() if groups > 1 else np.nan
    return Score(float(mean), float(error), int(counts.sum()))


def score_by_kind(values: ArrayLike, clusters: ArrayLike, kinds: Sequence[str]) -> dict[str, Score]:
    """The score of each kind of question, in the order of their first occurrence in `kinds` (N,), and of "all"."""
    points, groups, names = np.asarray(values), np.asarray(clusters), np.asarray(kinds)
    found = {kind: score(points[names == kind], groups[names == kind]) for kind in dict.fromkeys(kinds)}
    return {**found, "all": score(points, groups)}


def difference(
    values: ArrayLike, base: ArrayLike, clusters: ArrayLike, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """The paired difference of `values` and `base`, (N,) each, of the same questions.

    The interval is that of the percentile bootstrap: the middle 95 % of the means of redrawn clusters. Whole clusters
    are drawn with replacement, so that the questions of a picture, and the two values of a question, stay together. NaN
    for a single cluster.
    """
    gained = np.asarray(values, float) - np.asarray(base, float)
    own = score(gained, clusters)
    sums, counts = _cluster_sums(gained, clusters)
    generator, groups = np.random.default_rng(seed), len(sums)
    if groups == 1:
        return Difference(own.mean, own.error, own.count, math.nan, math.nan)
    some = max(1, AT_ONCE // groups)
    means = []
    for start in range(0, draws, some):
        chosen = generator.integers(groups, size=(min(some, draws - start), groups))
        means.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Difference(own.mean, own.error, own.count, float(low), float(high))


def _cluster_sums(values: ArrayLike, clusters: ArrayLike) -> tuple[Array, Array]:
    """(G,) the sum, and (G,) the number of the values of each cluster."""
    points, groups = np.asarray(values, float), np.asarray(clusters)
    if points.ndim != 1 or not len(points) or points.shape != groups.shape:
        raise ValueError(f"values and clusters must be equally long and not empty; got {points.shape}, {groups.shape}")
    _, member = np.unique(groups, return_inverse=True)
    return np.bincount(member, weights=points), np.bincount(member)
