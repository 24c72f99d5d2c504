"""The command line: `peft-moe-delta run | train | graft RECIPE`. The only module that prints or exits."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import redirect_stdout

from .errors import PeftMoeDeltaError
from .recipe import Run, read_recipe

COMMANDS = {
    "run": "the whole job: train, graft, score, and print the table",
    "train": "the adapter alone: expansion and, where the recipe has one, review",
    "graft": "the stock checkpoint: everything but scoring",
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit status 1 with one clear message for an error of ours."""
    parser = argparse.ArgumentParser(
        prog="peft-moe-delta",
        description="Teach an instruction-tuned language model new languages without re-aligning it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("recipe", help="a YAML file; examples/demo.yaml is one")
        command.add_argument("--quick", action="store_true", help="lay the recipe's section `quick` over the rest")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "transformers", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):  # Trainer's log lines are progress, not results
            result = _run(chosen.command, Run(read_recipe(chosen.recipe, quick=chosen.quick)))
    except PeftMoeDeltaError as error:
        sys.exit(f"error: {error}")
    print(result)


def _run(command: str, run: Run) -> str:
    """What a command has to say at its end."""
    if command == "train":
        return f"adapter: {run.adapter().folder}"
    if command == "graft":
        return f"checkpoint: {run.grafted().folder}"
    table = run.table().text()
    return f"{table}\n\nEverything is in {run.recipe.output}; the stock checkpoint is {run.grafted().folder}."


if __name__ == "__main__":
    main()
