"""`grow`: further languages for an adapter."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..recipe.growing import grow, read_growth
from .command import Command


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("growth", help="a YAML file: adapter, output, languages, experts; examples/grow.yaml is one")


def _grow(arguments: Namespace) -> str:
    return f"adapter: {grow(read_growth(arguments.growth))}"


COMMANDS = (Command("grow", "add languages to an adapter, trained or not", _add_arguments, _grow),)
