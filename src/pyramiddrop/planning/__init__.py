"""Find schedules for a budget of tokens, FLOPs, KV cache or time, and for the budgets that papers publish."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from pyramiddrop.cost import ModelShape, Prompt
from pyramiddrop.planning.budget import Budget, Clock
from pyramiddrop.planning.measured import MeasuredTimes
from pyramiddrop.planning.profile import Profile
from pyramiddrop.planning.solve import PAPER_STAGES, PYRAMIDS, Before, InfeasibleBudgetError, Plan, plan

__all__ = [
    "PYRAMIDS",
    "Before",
    "Budget",
    "Clock",
    "InfeasibleBudgetError",
    "MeasuredTimes",
    "Plan",
    "Profile",
    "PublishedPlan",
    "plan",
    "published_plans",
]


#: Visual tokens of a model -> the average visual tokens in a layer at which papers compare methods on it.
PUBLISHED = {576: (192, 128, 64), 2880: (640, 320, 160)}


@dataclass(frozen=True)
class PublishedPlan:
    """A pyramid for one of the budgets.

    Attributes:
        tokens: the budget, average visual tokens in a layer.
        pyramid: a description of the drop layers.
        plan: the schedule, or the nearest one if the budget is not `within_reach`.
    """

    tokens: int
    pyramid: str
    plan: Plan
    within_reach: bool


def published_plans(model: ModelShape, prompt: Prompt) -> list[PublishedPlan]:
    """All pyramids for all published budgets of a model with `visual_tokens`.

    Raises:
        ValueError: if there are no published budgets for this number.
    """
    budgets = PUBLISHED.get(prompt.visual_tokens)
    if budgets is None:
        raise ValueError(
            f"papers compare budgets of {' and '.join(map(str, PUBLISHED))} visual tokens, and this prompt has "
            f"{prompt.visual_tokens}: give a budget of your own"
        )
    pyramids: dict[str, dict[str, Any]] = {
        f"{PAPER_STAGES} equal stages": {"stages": PAPER_STAGES},
        f"{PAPER_STAGES + 1} equal stages": {"stages": PAPER_STAGES + 1},
        "concave": {"pyramid": "concave"},
        "one drop": {"pyramid": "single"},
    }
    found = []
    for tokens, (name, arguments) in product(budgets, pyramids.items()):
        try:
            found.append(PublishedPlan(tokens, name, plan(model, prompt, Budget(tokens=tokens), **arguments), True))
        except InfeasibleBudgetError as error:
            found.append(PublishedPlan(tokens, name, error.nearest, False))
    return found
