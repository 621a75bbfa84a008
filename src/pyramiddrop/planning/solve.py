"""Solve for the best schedule within a budget, or the nearest one if the budget is out of reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

from pyramiddrop.cost import (
    CONVENTIONS,
    CostBreakdown,
    DecoderShape,
    DropCounts,
    ModelShape,
    Prompt,
    RankingCost,
    attention_ranking_flops,
    estimate_cost,
)
from pyramiddrop.cost.estimate import drop_counts
from pyramiddrop.planning.budget import Budget, Meter, meter
from pyramiddrop.planning.profile import Profile, frontier
from pyramiddrop.schedule import (
    PreLLMSchedule,
    Schedule,
    Stage,
    concave_layers,
    equal_stage_layers,
    nearest_layers,
    powers,
)

PAPER_STAGES = 4
#: The smallest λ that the paper tried (its Table 4).
SMALLEST_PAPER_LAM = 0.4
#: The most drops of a plan: each one ranks and gathers rows.
MOST_DROPS = 4
#: Shapes of a pyramid: equal stages, drops at doubling depths, a single drop, or HiDrop's.
PYRAMIDS = ("equal", "concave", "single", "hidrop")
#: FastV's layer, the earliest one at which attention is informative.
SINGLE_LAYER = 2
#: HiDrop's drop layers in LLaVA-1.5-7B, and the layer of its early exit (arXiv 2602.23699), of 32 layers.
HIDROP_LAYERS, HIDROP_EXIT, HIDROP_DEPTH = (10, 14, 16, 18), 25, 32


@dataclass(frozen=True)
class Before:
    """A drop before the decoder, after which a plan is solved.

    Attributes:
        schedule: the schedule of that drop.
        line: the Python expression that builds its method.
        ranking_flops: FLOPs of its ranking, as `Method.ranking_flops` gives them.
    """

    schedule: PreLLMSchedule
    line: str
    ranking_flops: RankingCost

    def ranking_cost(self, shape: DecoderShape, drop: DropCounts) -> int:
        """FLOPs of ranking at any drop of the composition."""
        return attention_ranking_flops(shape, drop) if drop.layer else self.ranking_flops(shape, drop)


@dataclass(frozen=True)
class Plan:
    """A schedule and its cost.

    Attributes:
        arguments: the arguments of `PyramidDrop` that give this schedule for this depth.
        schedule: all drops, including one before the decoder.
        spent, vanilla_spent: its cost and vanilla's in the budget's unit.
        cost, vanilla: all costs, with and without dropping.
        pyramid: the shape: "equal", "concave", "single", "hidrop" or "profile".
        loss: the loss that a redundancy profile predicts; None without a profile.
        before: the drop before the decoder; None if there is none.
    """

    arguments: dict[str, Any]
    schedule: Schedule
    pyramid: str
    budget: Budget
    spent: float
    vanilla_spent: float
    prompt: Prompt
    cost: CostBreakdown
    vanilla: CostBreakdown
    loss: float | None = None
    before: Before | None = None

    @property
    def line(self) -> str:
        """The Python expression that builds the method."""
        inside = f"PyramidDrop({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"
        return f"{self.before.line} | {inside}" if self.before else inside

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and text."""
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
            "pyramid": self.pyramid,
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
    """No schedule of the requested shape is within the budget; `nearest` is the cheapest one."""

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
    pyramid: str | None = None,
    profile: Profile | None = None,
    before: Before | None = None,
) -> Plan:
    """Find the schedule that uses as much of `budget` as possible without exceeding it.

    Args:
        stages: solve λ for this number of equal stages.
        lam: solve the number of equal stages for this λ.
        pyramid: solve λ for a shape: "equal" (the fewest stages, from the paper's 4 on and with at most four drops, for
            which λ is at least 0.4, the smallest one in the paper; else the largest λ), "concave" (up to four drops,
            each at twice the depth of the one before), "single" (one drop before layer 2) or "hidrop" (drops before
            layers 10, 14, 16 and 18 of 32 and an early exit at layer 25: arXiv 2602.23699, without its late entry).
        profile: choose layers and keep ratios on the profile's grid that minimise the predicted loss, which is the sum
            over the drops of the loss of a single drop from the keep ratio before to the one after.
        before: a drop before the decoder, after which the schedule drops; the budget is that of both. Not with
            `profile`.

    Without `stages`, `lam`, `pyramid` and `profile`, the shape is "equal" if λ is at least 0.4, else "concave".

    Raises:
        InfeasibleBudgetError: if no such schedule is within the budget; its `nearest` is the cheapest.
        ValueError: for more than one of `lam`, `stages`, `pyramid` and `profile`, or values that do not fit the model.
    """
    asked = {"lam": lam, "stages": stages, "pyramid": pyramid, "profile": profile}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give at most one of {', '.join(asked)}, for the rest is solved; got {', '.join(given)}")
    if pyramid is not None and pyramid not in PYRAMIDS:
        raise ValueError(f"pyramid={pyramid!r} is not one of {', '.join(PYRAMIDS)}")
    if before is not None and profile is not None:
        raise ValueError("a profile is of all visual tokens of a prompt: give before or profile, not both")
    first = drop_counts(before.schedule, prompt) if before else []
    ranking = sum(before.ranking_flops(model.decoder, drop) for drop in first) if before else 0
    solver = _Solver(model, prompt, budget, meter(budget, model, prompt, ranking), before)
    if profile is not None:
        return solver.by_profile(profile)
    if lam is not None:
        return solver.stages_for(lam)
    if stages is not None:
        return solver.lam_for(stages)
    solve: dict[str | None, Callable[[], Plan]] = {
        "equal": solver.equal,
        "concave": solver.concave,
        "single": solver.single,
        "hidrop": solver.hidrop,
        None: solver.best,
    }
    return solve[pyramid]()


@dataclass(frozen=True)
class _Solver:
    model: ModelShape
    prompt: Prompt
    budget: Budget
    meter: Meter
    before: Before | None = None

    @property
    def depth(self) -> int:
        return self.model.decoder.layers

    @cached_property
    def allowed(self) -> tuple[int, ...]:
        """The layers before which tokens are best dropped."""
        return self.model.decoder.drop_layers()

    def falling(self, layers: Sequence[int], lam: float) -> Schedule:
        """Drops to λ, λ², λ³, ... before these layers, of the tokens that a drop before the decoder keeps."""
        return self.behind(Schedule.of(layers, powers(lam, len(layers))))

    def behind(self, schedule: Schedule) -> Schedule:
        """`schedule` after the drop before the decoder, if there is one."""
        return self.before.schedule.inside(schedule) if self.before else schedule

    def lam_for(self, stages: int) -> Plan:
        layers = equal_stage_layers(self.depth, stages, self.allowed)
        return self._solved(layers, {"stages": stages}, "equal", f"{stages} equal stages")

    def stages_for(self, lam: float) -> Plan:
        layers = {
            stages: equal_stage_layers(self.depth, stages, self.allowed) for stages in range(2, len(self.allowed) + 2)
        }
        spent = {stages: self.meter.spent(self.falling(layers[stages], lam)) for stages in layers}
        feasible = [stages for stages, value in spent.items() if value <= self.budget.limit]
        chosen = max(feasible, key=spent.__getitem__) if feasible else min(spent, key=spent.__getitem__)
        schedule = self.falling(layers[chosen], lam)
        given = {"lam": lam, "stages": chosen}
        return self._planned(given, schedule, "equal", bool(feasible), f"equal stages with lam={lam:g}")

    def best(self) -> Plan:
        """Equal stages if λ is in the paper's range, else drops that begin earlier."""
        found = self._feasible([self.equal, self.concave])
        return found[-1] if found else self.concave()

    def equal(self) -> Plan:
        most = min(len(self.allowed), MOST_DROPS) + 1
        found = self._feasible(partial(self.lam_for, stages) for stages in range(min(PAPER_STAGES, most), most + 1))
        return max(found, key=lambda one: one.arguments["lam"]) if found else self.lam_for(most)

    def _feasible(self, solvers: Iterable[Callable[[], Plan]]) -> list[Plan]:
        """The plans within the budget, up to the first one with λ in the paper's range."""
        found: list[Plan] = []
        for solve in solvers:
            with suppress(InfeasibleBudgetError):
                found.append(solve())
                if found[-1].arguments["lam"] >= SMALLEST_PAPER_LAM:
                    break
        return found

    def concave(self) -> Plan:
        with suppress(InfeasibleBudgetError):
            return self._concave(halvings=4)
        return self._concave(halvings=5)

    def _concave(self, halvings: int) -> Plan:
        layers = concave_layers(self.depth, self.allowed, halvings)
        return self._solved(layers, {"layers": layers}, "concave", f"drops before layers {layers}")

    def single(self) -> Plan:
        layers = nearest_layers([SINGLE_LAYER], self.allowed)
        return self._solved(layers, {"layers": layers}, "single", f"one drop before layer {layers[0]}")

    def hidrop(self) -> Plan:
        wanted = [round(self.depth * layer / HIDROP_DEPTH) for layer in (*HIDROP_LAYERS, HIDROP_EXIT)]
        if len(self.allowed) < len(wanted):
            raise ValueError(
                f"HiDrop's {len(wanted)} drops need as many layers; this model allows {list(self.allowed)}"
            )
        *layers, leaves = nearest_layers(wanted, self.allowed)
        lam, feasible = self._largest_lam(layers, leaves)
        keep = [*self._rounded(layers, powers(lam, len(layers))), 0.0]
        schedule = self.behind(Schedule.of([*layers, leaves], keep))
        what = f"drops before layers {layers} and none left from layer {leaves} on"
        return self._planned({"layers": [*layers, leaves], "keep": keep}, schedule, "hidrop", feasible, what)

    def by_profile(self, profile: Profile) -> Plan:
        if profile.num_layers != self.depth:
            raise ValueError(f"the profile is of a model with {profile.num_layers} layers; this one has {self.depth}")
        points = frontier(profile, self.meter)
        affordable = [point for point in points if self.meter.in_units(point.amount) <= self.budget.limit]
        chosen = affordable[-1] if affordable else points[0]
        layers, keep = map(list, zip(*(chosen.drops or ((profile.layers[0], 1.0),)), strict=True))
        given, what = {"layers": layers, "keep": keep}, "the profile's layers and shares"
        return self._planned(given, Schedule.of(layers, keep), "profile", bool(affordable), what, chosen.loss)

    def _solved(self, layers: Sequence[int], given: dict[str, Any], pyramid: str, kind: str) -> Plan:
        """The plan with the largest λ for drops before `layers`."""
        lam, feasible = self._largest_lam(layers)
        return self._planned({"lam": lam, **given}, self.falling(layers, lam), pyramid, feasible, kind)

    def _largest_lam(self, layers: Sequence[int], leaves: int | None = None) -> tuple[float, bool]:
        """The largest λ within the budget, and True; or the smallest useful λ, and False.

        If `leaves` is given, no visual token is left from that layer on.
        """

        def fits(lam: float) -> bool:
            schedule = self.falling(layers, lam)
            if leaves is not None:
                schedule = type(schedule)((*schedule.stages, Stage(leaves, 0.0)))
            return self.meter.spent(schedule) <= self.budget.limit

        # Below this λ one token is left after the first drop; its powers must not become 0 in floating point.
        smallest = max(1 / self.prompt.visual_tokens, 10 ** (-300 / len(layers)))
        if fits(1.0):
            return 1.0, True
        if not fits(smallest):
            return self._short(smallest, layers), False
        return self._short(largest(fits, smallest, 1.0), layers), True

    def _short(self, lam: float, layers: Sequence[int]) -> float:
        """The shortest decimal up to λ that keeps equally many tokens."""

        def counts(lam: float) -> list[int]:
            return self.falling(layers, lam).counts(self.prompt.visual_tokens)

        wanted = counts(lam)
        return shortest(lam, lambda short: counts(short) == wanted)

    def _rounded(self, layers: Sequence[int], keep: Sequence[float]) -> list[float]:
        """The shortest decimals up to `keep` that keep equally many tokens."""

        def count(layer: int, ratio: float) -> int:
            return self.behind(Schedule.of([layer], [ratio])).counts(self.prompt.visual_tokens)[-1]

        def short(layer: int, ratio: float) -> float:
            return shortest(ratio, lambda other: count(layer, other) == count(layer, ratio))

        found = [short(layer, ratio) for layer, ratio in zip(layers, keep, strict=True)]
        return list(accumulate(found, min))  # shortened less than the one before, it keeps equally many

    def _planned(
        self,
        arguments: dict[str, Any],
        schedule: Schedule,
        pyramid: str,
        feasible: bool,
        kind: str,
        loss: float | None = None,
    ) -> Plan:
        """The plan with its costs; InfeasibleBudgetError, which names the `kind` of plan, if it is not feasible."""
        ranking_cost = self.before.ranking_cost if self.before else attention_ranking_flops
        found = Plan(
            arguments=arguments,
            schedule=schedule,
            pyramid=pyramid,
            budget=self.budget,
            spent=self.meter.spent(schedule),
            vanilla_spent=self.meter.spent(None),
            prompt=self.prompt,
            cost=estimate_cost(self.model, self.prompt, schedule, ranking_cost),
            vanilla=estimate_cost(self.model, self.prompt),
            loss=loss,
            before=self.before,
        )
        if not feasible:
            raise InfeasibleBudgetError(found, kind)
        return found


def largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest float below `high` that `fits`, by bisection: `low` fits and `high` does not."""
    while low < (middle := (low + high) / 2) < high:
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def shortest(value: float, alike: Callable[[float], bool]) -> float:
    """The shortest decimal up to `value` that is `alike`, else `value` itself."""
    candidates = (math.floor(value * 10**digits) / 10**digits for digits in range(1, 17))
    return next((short for short in candidates if short > 0 and alike(short)), value)
