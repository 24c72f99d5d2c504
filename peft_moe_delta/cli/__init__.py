"""The command line: `peft-moe-delta COMMAND ...`. The only room that prints or exits.

Each module of this folder holds the commands of one job; `COMMANDS` lists them in the order of the work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import redirect_stdout

from ..errors import PeftMoeDeltaError
from . import allocation, delta, evaluate, explain, graft, grow, harness, mix, pipeline, publish
from .command import Command

COMMANDS: tuple[Command, ...] = (
    *pipeline.COMMANDS,
    *allocation.COMMANDS,
    *mix.COMMANDS,
    *grow.COMMANDS,
    *delta.COMMANDS,
    *graft.COMMANDS,
    *explain.COMMANDS,
    *evaluate.COMMANDS,
    *harness.COMMANDS,
    *publish.COMMANDS,
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit status 1 with one clear message for an error of ours."""
    parser = argparse.ArgumentParser(
        prog="peft-moe-delta",
        description="Teach an instruction-tuned language model new languages without re-aligning it.",
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = parsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("peft_moe_delta").setLevel(logging.INFO)  # our progress alone: other libraries log every request
    try:
        with redirect_stdout(sys.stderr):  # Trainer's log lines are progress, not results
            result = chosen.run(chosen)
    except PeftMoeDeltaError as error:
        sys.exit(f"error: {error}")
    print(result)
