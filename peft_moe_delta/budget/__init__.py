"""How much memory a training takes, and on how many GPUs it fits: known from configs, before anything is loaded."""

from .measure import Job, Measured, measure
from .strategies import Budget, Strategy, plan_budget

__all__ = ["Budget", "Job", "Measured", "Strategy", "measure", "plan_budget"]
