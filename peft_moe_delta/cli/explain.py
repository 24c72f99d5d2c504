"""`explain`: what an adapter can be shipped as, and why."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..graft.explain import explain
from .command import Command


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder or Hub id of the adapter; only its config is read")
    parser.add_argument("--post-trained", help="the model it is to be grafted onto; default: the adapter's base model")


def _explain(arguments: Namespace) -> str:
    fits = explain(arguments.adapter, arguments.post_trained)
    return "\n".join(f"{'no ' if fit.misfits else 'yes'}  {fit}" for fit in fits)


COMMANDS = (Command("explain", "what an adapter can be shipped as, and why", _add_arguments, _explain),)
