"""`plan`, carried out."""

from __future__ import annotations

from argparse import Namespace

import torch

from ...budget import plan_budget
from ...recipe import Recipe
from ...recipe.foresight import expansion_of


def plan(given: tuple[Recipe, Namespace]) -> str:
    recipe, arguments = given
    job = expansion_of(
        recipe,
        dtype=getattr(torch, arguments.base_dtype),
        autocast=arguments.precision == "bf16",
        checkpointing=arguments.checkpointing or recipe.expand.checkpointing,
        experts_as_base=arguments.expert_dtype == "base",
    )
    budget = plan_budget(job, arguments.gpus, arguments.memory)
    if arguments.tflops is None:
        return budget.table()
    return f"{budget.table()}\n\n{budget.hours(recipe.expand.steps, arguments.tflops * 1e12)}"
