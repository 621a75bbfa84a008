"""Solve a budget for a schedule: the best that the budget affords, or the nearest that is within reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyramiddrop.cost import CONVENTIONS, Account, ModelShape, Prompt, account
from pyramiddrop.planning.budget import Budget, Meter, meter
from pyramiddrop.planning.frontier import frontier
from pyramiddrop.planning.profile import Profile
from pyramiddrop.schedule import Schedule, equal_stage_layers, powers

PAPER_STAGES = 4
#: The smallest λ that the paper tried (its Table 4).
SMALLEST_PAPER_LAM = 0.4


@dataclass(frozen=True)
class Plan:
    """A schedule and what it costs.

    Attributes:
        arguments: of `PyramidDrop`, which make this schedule for this depth.
        spent, vanilla_spent: what it spends, and what vanilla would, in the budget's unit.
        cost, vanilla: every measure, with and without dropping.
        loss: what a redundancy profile predicts it to lose; None without a profile.
    """

    arguments: dict[str, Any]
    schedule: Schedule
    budget: Budget
    spent: float
    vanilla_spent: float
    prompt: Prompt
    cost: Account
    vanilla: Account
    loss: float | None = None

    @property
    def line(self) -> str:
        """The Python expression that makes the method."""
        return f"PyramidDrop({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        counts = self.schedule.counts(self.prompt.visual_tokens)
        stages = [
            {"layer": stage.layer, "keep": stage.keep, "tokens": count}
            for stage, count in zip(self.schedule.stages, counts, strict=True)
        ]
        ratios = {name: self.cost.flops(name) / self.vanilla.flops(name) for name in CONVENTIONS}
        return {
            "budget": {"kind": self.budget.kind, "limit": self.budget.limit, "convention": self.budget.convention},
            "spent": self.spent,
            "vanilla_spent": self.vanilla_spent,
            "python": self.line,
            "arguments": self.arguments,
            "stages": stages,
            "visual_tokens": self.prompt.visual_tokens,
            "text_tokens": self.prompt.text_tokens,
            "cost": self.cost.as_dict(),
            "vanilla": self.vanilla.as_dict(),
            "flops_ratio": ratios,
            "kv_ratio": self.cost.kv_bytes / self.vanilla.kv_bytes,
            "predicted_loss": self.loss,
        }


class InfeasibleBudgetError(ValueError):
    """No schedule of the asked kind is within the budget. `nearest` is the cheapest one, which is the nearest."""

    def __init__(self, nearest: Plan, kind: str) -> None:
        self.nearest = nearest
        budget = nearest.budget
        super().__init__(
            f"{budget.describe(budget.limit)} is out of reach of {kind}; "
            f"the nearest within reach is {budget.describe(nearest.spent)}, by {nearest.line}"
        )


def plan(
    model: ModelShape,
    prompt: Prompt,
    budget: Budget,
    *,
    lam: float | None = None,
    stages: int | None = None,
    profile: Profile | None = None,
) -> Plan:
    """The schedule that spends most of `budget`, and never more.

    With `stages`, λ is solved for so many equal stages; with `lam`, the number of equal stages. With neither, both:
    the fewest stages, from the paper's 4 on, that leave λ at 0.4 (the smallest that the paper tried) or above, and
    where none do, those with the largest λ. With `profile`, layers and shares are chosen from its grid so that the
    predicted loss is least: the sum over the drops of what a single drop at that layer loses by going from the share
    before to the share after.

    Raises:
        InfeasibleBudgetError: where no such schedule is within the budget; its `nearest` is the cheapest.
        ValueError: for more than one of `lam`, `stages` and `profile`, or values that do not fit the model.
    """
    given = [name for name, value in (("lam", lam), ("stages", stages), ("profile", profile)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"give at most one of lam, stages and profile, for the rest is solved; got {', '.join(given)}")
    solver = _Solver(model, prompt, budget, meter(budget, model, prompt))
    if profile is not None:
        return solver.by_profile(profile)
    if lam is not None:
        return solver.stages_for(lam)
    return solver.lam_for(stages) if stages is not None else solver.both()


@dataclass(frozen=True)
class _Solver:
    model: ModelShape
    prompt: Prompt
    budget: Budget
    meter: Meter

    @property
    def depth(self) -> int:
        return self.model.decoder.layers

    @cached_property
    def allowed(self) -> tuple[int, ...]:
        """Before which layers the model is best pruned."""
        return self.model.decoder.drop_layers()

    @property
    def most_stages(self) -> int:
        return len(self.allowed) + 1

    def lam_for(self, stages: int) -> Plan:
        equal_stage_layers(self.depth, stages, self.allowed)  # refuses what the model does not allow
        lam, feasible = self._largest_lam(stages)
        return self._judged(self._equal(lam, stages), feasible, f"{stages} equal stages")

    def stages_for(self, lam: float) -> Plan:
        schedules = {stages: self._equal_schedule(lam, stages) for stages in range(2, self.most_stages + 1)}
        spent = {stages: self.meter.spent(schedule) for stages, schedule in schedules.items()}
        feasible = [stages for stages, value in spent.items() if value <= self.budget.limit]
        if feasible:
            return self._equal(lam, max(feasible, key=lambda stages: spent[stages]))
        nearest = min(spent, key=lambda stages: spent[stages])
        raise InfeasibleBudgetError(self._equal(lam, nearest), f"equal stages with lam={lam:g}")

    def both(self) -> Plan:
        fewest = min(PAPER_STAGES, self.most_stages)
        best: tuple[float, int] | None = None
        for stages in range(fewest, self.most_stages + 1):
            lam, feasible = self._largest_lam(stages)
            if feasible and (best is None or lam > best[0]):
                best = lam, stages
            if best is not None and best[0] >= SMALLEST_PAPER_LAM:
                break
        if best is None:
            most = self.most_stages
            return self._judged(self._equal(self._largest_lam(most)[0], most), False, "equal stages")
        return self._equal(*best)

    def by_profile(self, profile: Profile) -> Plan:
        if profile.num_layers != self.depth:
            raise ValueError(f"the profile is of a model with {profile.num_layers} layers; this one has {self.depth}")
        points = frontier(profile, self.meter)
        affordable = [point for point in points if self.meter.in_units(point.amount) <= self.budget.limit]
        chosen = affordable[-1] if affordable else points[0]
        drops = chosen.drops or ((profile.layers[0], 1.0),)
        layers, keep = [layer for layer, _ in drops], [share for _, share in drops]
        found = self._planned({"layers": layers, "keep": keep}, Schedule.of(layers, keep), chosen.loss)
        return self._judged(found, bool(affordable), "the profile's layers and shares")

    def _judged(self, found: Plan, feasible: bool, kind: str) -> Plan:
        if not feasible:
            raise InfeasibleBudgetError(found, kind)
        return found

    def _largest_lam(self, stages: int) -> tuple[float, bool]:
        """The largest λ within the budget, and True; or the smallest λ of use, and False."""

        def fits(lam: float) -> bool:
            return self.meter.spent(self._equal_schedule(lam, stages)) <= self.budget.limit

        # Below this λ one token stays after the first drop; its powers must not become 0 in floating point.
        smallest = max(1 / self.prompt.visual_tokens, 10 ** (-300 / (stages - 1)))
        if fits(1.0):
            return 1.0, True
        if not fits(smallest):
            return self._short(smallest, stages), False
        return self._short(largest(fits, smallest, 1.0), stages), True

    def _short(self, lam: float, stages: int) -> float:
        """The shortest decimal up to λ that keeps as many tokens."""
        counts = self._counts(lam, stages)
        return shortest(lam, lambda short: self._counts(short, stages) == counts)

    def _counts(self, lam: float, stages: int) -> list[int]:
        return self._equal_schedule(lam, stages).counts(self.prompt.visual_tokens)

    def _equal_schedule(self, lam: float, stages: int) -> Schedule:
        return Schedule.of(equal_stage_layers(self.depth, stages, self.allowed), powers(lam, stages - 1))

    def _equal(self, lam: float, stages: int) -> Plan:
        return self._planned({"lam": lam, "stages": stages}, self._equal_schedule(lam, stages))

    def _planned(self, arguments: dict[str, Any], schedule: Schedule, loss: float | None = None) -> Plan:
        return Plan(
            arguments=arguments,
            schedule=schedule,
            budget=self.budget,
            spent=self.meter.spent(schedule),
            vanilla_spent=self.meter.spent(None),
            prompt=self.prompt,
            cost=account(self.model, self.prompt, schedule),
            vanilla=account(self.model, self.prompt),
            loss=loss,
        )


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
