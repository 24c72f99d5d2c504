"""`run`, `train`, `status` and `grow`: a recipe, whole or up to its adapter; how far it is; further languages."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..recipe import Recipe, read_recipe
from ..recipe.growth import Growth, read_growth
from .options import Command


def _add_run_arguments(parser: ArgumentParser) -> None:
    _add_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what would be done, in seconds; run nothing"
    )


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file; examples/demo.yaml is one")
    parser.add_argument("--quick", action="store_true", help="lay the recipe's section `quick` over the rest")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="changes",
        help="change a field of the recipe, such as expand.steps=200; may be given several times",
    )


def _read(arguments: Namespace) -> Recipe:
    return read_recipe(arguments.recipe, quick=arguments.quick, changes=arguments.changes)


def _read_run(arguments: Namespace) -> tuple[Recipe, bool]:
    return _read(arguments), arguments.dry_run


def _add_growth(parser: ArgumentParser) -> None:
    parser.add_argument("growth", help="a YAML file: adapter, output, languages, experts; examples/grow.yaml is one")


def _read_growth(arguments: Namespace) -> Growth:
    return read_growth(arguments.growth)


COMMANDS = (
    Command(
        "run", "the whole job: train, graft, score, and write the report", _add_run_arguments, "pipeline:run", _read_run
    ),
    Command(
        "train",
        "the adapter alone: expansion and, where the recipe has one, review",
        _add_run_arguments,
        "pipeline:train",
        _read_run,
    ),
    Command(
        "status",
        "a recipe's steps: which are done, and what the next run would do",
        _add_arguments,
        "pipeline:status",
        _read,
    ),
    Command("grow", "add languages to an adapter, trained or not", _add_growth, "pipeline:grow", _read_growth),
)
