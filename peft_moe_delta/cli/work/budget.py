"""`plan`, carried out."""

from __future__ import annotations

from argparse import Namespace

import torch

from ...budget import Job, plan_budget
from ...loading import load_config
from ...recipe import Recipe
from ...recipe.stages import adapter_config


def plan(given: tuple[Recipe, Namespace]) -> str:
    recipe, arguments = given
    cut = {} if recipe.num_hidden_layers is None else {"num_hidden_layers": recipe.num_hidden_layers}
    job = Job(
        model=load_config(recipe.model, **cut),
        adapter=adapter_config(recipe),
        batch_size=recipe.expand.batch_size,
        sequence_length=recipe.expand.sequence_length,
        dtype=getattr(torch, arguments.base_dtype),
        autocast=arguments.precision == "bf16",
        checkpointing=arguments.checkpointing or recipe.expand.checkpointing,
        experts_as_base=arguments.expert_dtype == "base",
    )
    budget = plan_budget(job, arguments.gpus, arguments.memory)
    if arguments.tflops is None:
        return budget.table()
    return f"{budget.table()}\n\n{budget.hours(recipe.expand.steps, arguments.tflops * 1e12)}"
