"""The command line: `peft-moe-delta COMMAND ...`. The only room that prints or exits.

Each module of this folder declares the commands of one job; `COMMANDS` lists them in the order of the work. None of
them needs PyTorch: what a command does is in `work/`, imported once its arguments and files of settings are read.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ..program import NAME, VERSION
from . import allocation, budget, delta, evaluate, graft, mix, pipeline, publish, served
from .failure import CheckFailed, failure_of, sigterm_as_ctrl_c
from .options import Command
from .parser import Parser, printable

COMMANDS: tuple[Command, ...] = (
    *pipeline.COMMANDS,
    *budget.COMMANDS,
    *allocation.COMMANDS,
    *mix.COMMANDS,
    *delta.COMMANDS,
    *graft.COMMANDS,
    *served.COMMANDS,
    *evaluate.COMMANDS,
    *publish.COMMANDS,
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command. What a user or the machine can do wrong ends in one line on standard error, and a status of
    `failure`'s table."""
    parser = command_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks, through the extra `completion`
        importlib.import_module("argcomplete").autocomplete(parser)
    arguments = sys.argv[1:] if arguments is None else arguments
    for argument in arguments:
        if argument != printable(argument) or "\0" in argument:  # no file of ours could hold it, or be called that
            parser.error(f"{argument!r} is not valid Unicode, or has a null character")
    chosen = parser.parse_args(arguments)
    verbosity = getattr(chosen, "verbosity", "normal")
    try:
        with sigterm_as_ctrl_c():
            result = _carry_out(chosen.chosen, chosen, verbosity)
    except CheckFailed as found:
        print(printable(str(found)))
        sys.exit(1)
    except BaseException as error:
        failure = failure_of(error)
        if failure is None:
            raise
        if verbosity == "verbose":
            traceback.print_exc()
        print(failure, file=sys.stderr)
        raise failure from error
    print(printable(result))


def command_parser() -> Parser:
    """All commands with their arguments."""
    parser = Parser(
        prog=NAME, description="Teach an instruction-tuned language model new languages without re-aligning it."
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {VERSION}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = parsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(chosen=command)
    return parser


def _carry_out(command: Command, arguments: Namespace, verbosity: str) -> str:
    """What a command returns. Our own log goes to standard error, and other libraries' warnings; with `quiet`, bars and
    lines of theirs are dropped, with `verbose` their log is kept."""
    level = logging.INFO if verbosity == "verbose" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("peft_moe_delta").setLevel(logging.WARNING if verbosity == "quiet" else logging.INFO)
    progress = Nowhere() if verbosity == "quiet" else sys.stderr
    # Trainer's log lines are progress, not results
    with redirect_stdout(progress), redirect_stderr(progress), warnings.catch_warnings(), _warnings_in_a_line():
        if verbosity != "verbose":  # between other libraries: a user of a command can do nothing about it
            warnings.simplefilter("ignore", FutureWarning)
        given = command.read(arguments)
        module, _, function = command.work.partition(":")
        result: str = getattr(importlib.import_module(f".work.{module}", __package__), function)(given)
    return result


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings as whoever types a command reads them: without the line of code that they come from."""
    kept = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = kept


class Nowhere(io.TextIOBase):
    """Takes text and drops it. It is never closed, as libraries may keep it as the stream that they log to."""

    def write(self, text: str) -> int:
        return len(text)
