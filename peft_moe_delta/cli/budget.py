"""`plan`: what a recipe's training takes, and on which GPUs it fits, from configs alone."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from ..kinds import bytes_of
from ..recipe import Recipe, read_recipe
from .options import Command


def _size(text: str) -> int:
    if (number := bytes_of(text)) < 1:
        raise ArgumentTypeError(f"expected a number of bytes or such as 80GB, got {text!r}")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", help="a YAML file; of the models only config.json is read, and no text")
    add("--quick", action="store_true", help="lay the recipe's section `quick` over the rest")
    add("--gpus", type=_count, default=1, metavar="N", help="how many GPUs there are (1)")
    add("--memory", type=_size, default="80GB", metavar="SIZE", help="of each (80GB)")
    add(
        "--base-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the base's weights: float32 as `run` loads them (default), bfloat16 in a training of your own",
    )  # fmt: skip
    add(
        "--expert-dtype", choices=("float32", "base"), default="float32",
        help="of the experts: float32 as PEFT makes them (default), or the base's (autocast_adapter_dtype=False)",
    )  # fmt: skip
    add(
        "--precision", choices=("bf16", "fp32"), default="bf16",
        help="of the arithmetic (bf16), whatever this machine would choose",
    )  # fmt: skip
    add(
        "--checkpointing", action="store_true",
        help="with activation checkpointing of decoder layers, where the recipe has none",
    )  # fmt: skip
    add(
        "--tflops", type=_count, metavar="N",
        help="also say how many GPU hours the expansion takes, if a GPU really computes N TFLOP a second (40%% of what "
        "its maker states is a usual share)",
    )  # fmt: skip


def _read(arguments: Namespace) -> tuple[Recipe, Namespace]:
    return read_recipe(arguments.recipe, quick=arguments.quick), arguments


COMMANDS = (
    Command("plan", "memory and work of a training on GPUs, and what fits", _add_arguments, "budget:plan", _read),
)
