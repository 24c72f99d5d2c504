"""What a command of the command line is."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        name: what is typed.
        summary: one line for `--help`.
        add_arguments: declares its arguments.
        run: does the work and returns what is printed on standard output; progress goes to standard error.
    """

    name: str
    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], str]
