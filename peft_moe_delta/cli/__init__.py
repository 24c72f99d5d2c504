"""The command line: `peft-moe-delta COMMAND ...`. The only room that prints or exits.

Each module of this folder holds the commands of one job; `COMMANDS` lists them in the order of the work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import redirect_stdout
from typing import NoReturn

import torch
from safetensors import SafetensorError

from ..errors import PeftMoeDeltaError
from . import allocation, budget, delta, evaluate, graft, mix, pipeline, publish
from .options import Command

COMMANDS: tuple[Command, ...] = (
    *pipeline.COMMANDS,
    *budget.COMMANDS,
    *allocation.COMMANDS,
    *mix.COMMANDS,
    *delta.COMMANDS,
    *graft.COMMANDS,
    *evaluate.COMMANDS,
    *publish.COMMANDS,
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command. What a user or the machine can do wrong ends in one line on standard error: exit status 2 for a
    command line that cannot be read, 130 after Ctrl-C, 1 for anything else."""
    parser = Parser(
        prog="peft-moe-delta",
        description="Teach an instruction-tuned language model new languages without re-aligning it.",
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = parsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = sys.argv[1:] if arguments is None else arguments
    for argument in arguments:
        if argument != _printable(argument) or "\0" in argument:  # no file of ours could hold it, or be called that
            parser.error(f"{argument!r} is not valid Unicode, or has a null character")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("peft_moe_delta").setLevel(logging.INFO)  # our progress alone: other libraries log every request
    try:
        with redirect_stdout(sys.stderr):  # Trainer's log lines are progress, not results
            result = chosen.run(chosen)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, what was under way is gone", file=sys.stderr)
        sys.exit(130)
    except PeftMoeDeltaError as error:
        sys.exit(f"error: {_one_line(error)}")
    except (OSError, SafetensorError) as error:  # the disk is full, a folder may not be written, the network is away
        sys.exit(f"error: {_one_line(error)}. Nothing half done was left behind: mend the cause and run it again.")
    except (MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(
            f"error: out of memory: {_one_line(error)}. Take smaller batches, shorter sequences or a smaller model."
        )
    print(_printable(result))


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line instead of below the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_one_line(message)}. `{self.prog} --help` lists what there is.\n")


def _one_line(error: BaseException | str) -> str:
    return _printable(" ".join(str(error).split()))


def _printable(text: str) -> str:
    """Text that any stream takes: a file's name need not be valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
