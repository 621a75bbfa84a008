"""Owns the means of a study: what values of samples come to, with clustered errors, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.scores import Score, score, score_by_kind

#: A value a sample; None where there is nothing to score.
Values = Sequence[float | None]


class Means:
    """Means over these samples; those without a cluster are one of their own."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.kinds = [sample.kind for sample in samples]
        self.clusters = [sample.cluster or f"#{number}" for number, sample in enumerate(samples)]

    def score(self, values: Values) -> dict[str, Any] | None:
        """`mean`, its standard `error` (None where a single cluster tells nothing) and `count`; None for no values."""
        known, clusters, _ = self._known(values)
        return _plain(score(known, clusters)) if known else None

    def by_kind(self, values: Values) -> dict[str, dict[str, Any]]:
        """The same for each kind of question, where there are several."""
        known, clusters, kinds = self._known(values)
        if len(set(kinds)) < 2:
            return {}
        found = score_by_kind(known, clusters, kinds)
        return {kind: _plain(found[kind]) for kind in dict.fromkeys(kinds)}

    def _known(self, values: Values) -> tuple[list[float], list[str], list[str]]:
        rows = [row for row in zip(values, self.clusters, self.kinds, strict=True) if row[0] is not None]
        return [value for value, _, _ in rows if value is not None], [row[1] for row in rows], [row[2] for row in rows]


def _plain(one: Score) -> dict[str, Any]:
    """JSON has no NaN."""
    return {**asdict(one), "error": None if math.isnan(one.error) else one.error}


def ratio(used: Values, vanilla: Values) -> float | None:
    """What all samples used against what they use without dropping; None where some number is not known."""
    numbers, plain = [one for one in used if one is not None], [one for one in vanilla if one is not None]
    return sum(numbers) / sum(plain) if len(numbers) == len(used) and len(plain) == len(vanilla) else None
