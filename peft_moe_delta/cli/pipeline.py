"""`run` and `train`: a recipe, whole or up to its adapter."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..recipe import Run, read_recipe
from .command import Command


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file; examples/demo.yaml is one")
    parser.add_argument("--quick", action="store_true", help="lay the recipe's section `quick` over the rest")


def _run(arguments: Namespace) -> str:
    run = Run(read_recipe(arguments.recipe, quick=arguments.quick))
    table = run.table().text()
    return f"{table}\n\nEverything is in {run.recipe.output}; the stock checkpoint is {run.grafted().folder}."


def _train(arguments: Namespace) -> str:
    run = Run(read_recipe(arguments.recipe, quick=arguments.quick))
    return f"adapter: {run.adapter().folder}"


COMMANDS = (
    Command("run", "the whole job: train, graft, score, and print the table", _add_arguments, _run),
    Command("train", "the adapter alone: expansion and, where the recipe has one, review", _add_arguments, _train),
)
