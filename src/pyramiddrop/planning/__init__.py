"""Find schedules for a budget of tokens, FLOPs, KV cache or time."""

from pyramiddrop.planning.budget import Budget, Clock
from pyramiddrop.planning.measured import MeasuredTimes
from pyramiddrop.planning.profile import Profile
from pyramiddrop.planning.published import PublishedPlan, published_plans
from pyramiddrop.planning.solve import PYRAMIDS, Before, InfeasibleBudgetError, Plan, plan

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
