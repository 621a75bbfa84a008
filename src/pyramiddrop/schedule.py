"""Schedules: before which layers tokens are dropped, how many are kept, and the paper's presets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


def is_whole(value: object) -> bool:
    """True for an int, but not for a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for an int or a float, but not for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Stage:
    """One drop before the 0-based decoder layer `layer`, which keeps the share `keep` of the ORIGINAL visual tokens.

    With a share of 0, this layer and the later ones have no visual token (early exit).
    """

    layer: int
    keep: float

    def count(self, tokens: int) -> int:
        """How many of `tokens` original visual tokens are kept: floor(tokens * keep), at least one; none at keep 0.

        The product is a float product, as in the official code: of 100 tokens, keep 0.29 keeps 28.
        """
        return min(tokens, max(int(self.keep > 0), math.floor(tokens * self.keep)))


@dataclass(frozen=True)
class Schedule:
    """The drops in one model, shallow to deep. Layers increase strictly, and no drop keeps more than the one before.

    Raises:
        ValueError: if there is no drop, a layer is below 1, layers do not increase, a keep ratio is outside [0, 1] or
            larger than the one before, or a keep ratio of 0 is not the last.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a schedule needs at least one stage; got none")
        layers = list(self.layers)
        if not all(map(is_whole, layers)):
            raise ValueError(f"layers must be whole numbers; got {layers}")
        if layers[0] < 1:
            raise ValueError(
                f"layers must be at least 1, for nothing can be ranked before layer 0 has run; got {layers}"
            )
        if any(after <= before for before, after in pairwise(layers)):
            raise ValueError(f"layers must increase strictly; got {layers}")
        _check_keep(list(self.keep))

    @classmethod
    def of(cls, layers: Iterable[int], keep: Iterable[float]) -> Schedule:
        """Pair `layers` (0-based, drop before the layer) with `keep` (of the original count)."""
        layers, keep = list(layers), list(keep)
        if len(layers) != len(keep):
            raise ValueError(f"layers and keep must have the same length; got layers {layers} and keep {keep}")
        return cls(tuple(Stage(layer, ratio) for layer, ratio in zip(layers, keep, strict=True)))

    @classmethod
    def equal(cls, num_layers: int, stages: int, keep: Sequence[float]) -> Schedule:
        """Cut a model of `num_layers` layers into equal `stages`; stage k + 1 begins with the share `keep[k]`."""
        return cls.of(equal_stage_layers(num_layers, stages), keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each drop, shallow to deep."""
        return tuple(stage.layer for stage in self.stages)

    @property
    def keep(self) -> tuple[float, ...]:
        """The keep ratio of each drop."""
        return tuple(stage.keep for stage in self.stages)

    def check_depth(self, num_layers: int) -> None:
        """Raise ValueError if a drop lies beyond a model of `num_layers` layers."""
        if self.layers[-1] >= num_layers:
            raise ValueError(
                f"layers must be in 1..{num_layers - 1} for a model of {num_layers} layers; got {list(self.layers)}"
            )

    def counts(self, tokens: int) -> list[int]:
        """How many of `tokens` original visual tokens remain after each drop."""
        return [stage.count(tokens) for stage in self.stages]

    def stage_of(self, layer: int) -> int:
        """The number of drops before layer `layer`, its own included."""
        return sum(stage.layer <= layer for stage in self.stages)


@dataclass(frozen=True)
class PreLLMSchedule(Schedule):
    """A drop before the decoder (before layer 0), optionally followed by drops inside it."""

    @classmethod
    def keeping(cls, keep: float) -> PreLLMSchedule:
        """A schedule with the single drop that keeps the share `keep`."""
        return cls((Stage(0, keep),))

    def starting_with(self, keep: float) -> PreLLMSchedule:
        """This schedule with another first share `keep`; later drops keep the same share of that as before."""
        first = self.stages[0].keep
        return PreLLMSchedule((Stage(0, keep), *(Stage(s.layer, keep * (s.keep / first)) for s in self.stages[1:])))

    def inside(self, schedule: Schedule) -> PreLLMSchedule:
        """This drop followed by those of `schedule`, whose keep ratios refer to the tokens that this one keeps."""
        first = self.stages[0].keep
        return PreLLMSchedule((*self.stages, *(Stage(s.layer, first * s.keep) for s in schedule.stages)))

    def __post_init__(self) -> None:
        keep = list(self.keep)
        _check_keep(keep)
        if keep[0] == 0:
            raise ValueError(
                f"keep must be above 0 before the decoder, for no picture would be left to answer from; got {keep[0]}. "
                "A keep of 0 is allowed at the last drop inside it (PyramidDrop, FastV)"
            )


def equal_stage_layers(num_layers: int, stages: int, allowed: Sequence[int] | None = None) -> list[int]:
    """The drop layers of `stages` equal stages: 32 layers in 4 stages drop before layers 8, 16 and 24.

    Args:
        allowed: the layers before which this model can drop, ascending; None: all. Each drop moves to the nearest free
            one, to the lower one of two equally near.

    Raises:
        ValueError: if there are fewer layers than stages.
    """
    if stages < 2:
        raise ValueError(f"stages must be between 2 and the model's {num_layers} layers; got {stages}")
    if stages > num_layers:
        way_out = f"give at most {num_layers} stages" if num_layers > 1 else "nothing can be dropped inside it"
        raise ValueError(f"{stages} stages need a model of {stages} layers, and this one has {num_layers}: {way_out}")
    equal = [num_layers * stage // stages for stage in range(1, stages)]
    if allowed is None:
        return equal
    if len(allowed) < len(equal):
        way_out = f"give at most {len(allowed) + 1} stages" if allowed else "no stages fit it"
        raise ValueError(
            f"{stages} stages need {len(equal)} layers to drop before; this model allows {list(allowed)}: {way_out}"
        )
    return nearest_layers(equal, allowed)


def concave_layers(num_layers: int, allowed: Sequence[int], halvings: int = 4) -> list[int]:
    """At most four drop layers, each at twice the depth of the one before: 2, 4, 8 and 16 of 32.

    Most layers of a deep model then see few tokens. Equal stages cannot do this: if the first drop lies before layer 8
    of 32, a quarter of the layers sees all tokens.

    Args:
        halvings: how often the depth is halved to reach the first drop; with 5, the drops lie before layers 1, 2, 4
            and 8 of 32.
    """
    halves = sorted({max(1, num_layers // 2**halving) for halving in range(halvings - 3, halvings + 1)})
    return nearest_layers(halves[-len(allowed) :], allowed)


def nearest_layers(wanted: Sequence[int], allowed: Sequence[int]) -> list[int]:
    """For each wanted layer the nearest free allowed one, the lower one of two equally near."""
    left, chosen = list(allowed), list[int]()
    for drop in range(len(wanted), 0, -1):
        candidates = left[drop - 1 :]  # earlier drops need a layer each
        nearest = min(candidates, key=lambda layer: (abs(layer - wanted[drop - 1]), layer))
        chosen.insert(0, nearest)
        left = left[: left.index(nearest)]
    return chosen


def powers(lam: float, drops: int) -> list[float]:
    """The paper's keep ratios: λ, λ², λ³, ..."""
    if not is_number(lam) or not 0 < lam <= 1:
        raise ValueError(f"lam must be a number in (0, 1]; got {lam!r}")
    return [lam**drop for drop in range(1, drops + 1)]


def _check_keep(keep: list[float]) -> None:
    if not all(is_number(ratio) and 0 <= ratio <= 1 for ratio in keep):
        raise ValueError(f"keep ratios must be in [0, 1]; got {keep}")
    if any(after > before for before, after in pairwise(keep)):
        raise ValueError(f"keep ratios are shares of the original count and must not increase; got {keep}")
    if 0 in keep[:-1]:
        last = keep.index(0) + 1
        raise ValueError(
            f"a keep ratio of 0 leaves no visual token to drop later, so it must be the last; got {keep}. Leave out "
            f"the {len(keep) - last} drops behind it: keep={keep[:last]}, and the first {last} of the layers"
        )
