"""From a budget to a schedule: how to drop, for what a prefill may cost."""

from pyramiddrop.planning.budget import Budget, Clock
from pyramiddrop.planning.profile import Profile
from pyramiddrop.planning.solve import InfeasibleBudgetError, Plan, plan

__all__ = ["Budget", "Clock", "InfeasibleBudgetError", "Plan", "Profile", "plan"]
