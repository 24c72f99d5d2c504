"""`init`, `run`, `train`, `status`, `grow`: a recipe to start from, carried out, looked at; further languages."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any, Literal, TypeAlias

from ..errors import RecipeError
from ..recipe import Recipe, read_recipe
from ..recipe.growth import Growth, read_growth
from .options import Command, pairs_of

Dry: TypeAlias = Literal["look", "timed"] | None
"""Whether nothing is to be run: only looked at, or a few passes timed as well."""


def _add_run_arguments(parser: ArgumentParser) -> None:
    _add_arguments(parser)
    _add_dry_run(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace trainings that the recipe, a model or text has changed for, and results that were edited",
    )


def _add_dry_run(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what would be done, in seconds; run nothing"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="with --dry-run: time a few passes on random weights, and say how long all take",
    )


def _dry_of(arguments: Namespace) -> Dry:
    if arguments.time and not arguments.dry_run:
        raise RecipeError("--time belongs to --dry-run, and does nothing alone. Give both, or neither.")
    return "timed" if arguments.time else "look" if arguments.dry_run else None


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


def _read_run(arguments: Namespace) -> tuple[Recipe, Dry, bool]:
    return _read(arguments), _dry_of(arguments), arguments.overwrite


def _add_growth(parser: ArgumentParser) -> None:
    parser.add_argument("growth", help="a YAML file: adapter, output, languages, experts; examples/grow.yaml is one")
    _add_dry_run(parser)


def _read_growth(arguments: Namespace) -> tuple[Growth, Dry]:
    return read_growth(arguments.growth), _dry_of(arguments)


def _add_init(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the base model: a Hub id or a folder")
    parser.add_argument("--post-trained", metavar="MODEL", help="the model that was post-trained from that very base")
    pairs: dict[str, Any] = {"action": "append", "default": [], "metavar": "CODE=FILE"}
    parser.add_argument("--language", required=True, help="a language to learn, and its text; once or more", **pairs)
    parser.add_argument("--original", help="a language that the model speaks, and its text", **pairs)


def _read_init(arguments: Namespace) -> tuple[str, str | None, dict[str, str], dict[str, str]]:
    texts = [pairs_of(f"--{name}", getattr(arguments, name)) for name in ("language", "original")]
    return arguments.model, arguments.post_trained, texts[0], texts[1]


COMMANDS = (
    Command(
        "init",
        "a recipe to start from, for your model and text, on standard output",
        _add_init,
        "pipeline:init",
        _read_init,
    ),
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
