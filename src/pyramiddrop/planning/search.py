"""Search for a number: the largest that fits, and the shortest decimal that has the same effect."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest float below `high` that fits, where `low` does, `high` does not, and all between go one way."""
    while low < (middle := (low + high) / 2) < high:
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def shortest(value: float, alike: Callable[[float], bool]) -> float:
    """The shortest decimal up to `value` that is `alike`; `value` itself where none of 16 digits is."""
    candidates = (math.floor(value * 10**digits) / 10**digits for digits in range(1, 17))
    return next((short for short in candidates if short > 0 and alike(short)), value)
