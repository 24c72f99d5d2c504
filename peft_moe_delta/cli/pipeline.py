"""`run`, `train` and `grow`: a recipe, whole or up to its adapter; further languages for an adapter."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..evaluation.page import markdown
from ..hub import push_to_hub
from ..hub.card import CARD_FILE
from ..recipe import OURS, Run, read_recipe
from ..recipe.growing import grow, read_growth
from .options import Command
from .publish import card_files


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file; examples/demo.yaml is one")
    parser.add_argument("--quick", action="store_true", help="lay the recipe's section `quick` over the rest")


def _run(arguments: Namespace) -> str:
    run = Run(read_recipe(arguments.recipe, quick=arguments.quick))
    report = run.report()
    cards = run.cards(report)
    lines = [markdown(report, OURS), ""]
    if run.recipe.push is not None:
        files = card_files(cards[0]) if cards else None
        address = push_to_hub(run.grafted().folder, run.recipe.push, extra_files=files)
        lines.append(f"The stock checkpoint went to {address}.")
    lines += [f"A model card: {folder / CARD_FILE}" for folder in cards]
    lines.append(f"The report with its pictures: {run.page}")
    if run.recipe.graft.by_context:
        lines.append(f"Routed by context, with a modelling file of its own: {run.by_context().folder}.")
    lines.append(f"Everything is in {run.recipe.output}; the stock checkpoint is {run.grafted().folder}.")
    return "\n".join(lines)


def _train(arguments: Namespace) -> str:
    run = Run(read_recipe(arguments.recipe, quick=arguments.quick))
    return f"adapter: {run.adapter().folder}"


def _add_growth(parser: ArgumentParser) -> None:
    parser.add_argument("growth", help="a YAML file: adapter, output, languages, experts; examples/grow.yaml is one")


def _grow(arguments: Namespace) -> str:
    return f"adapter: {grow(read_growth(arguments.growth))}"


COMMANDS = (
    Command("run", "the whole job: train, graft, score, and write the report", _add_arguments, _run),
    Command("train", "the adapter alone: expansion and, where the recipe has one, review", _add_arguments, _train),
    Command("grow", "add languages to an adapter, trained or not", _add_growth, _grow),
)
