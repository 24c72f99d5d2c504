"""What a command is, and how its options are read: from flags, from a YAML file with the same names, or both."""

from __future__ import annotations

import math
import os
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RecipeError
from ..kinds import did_you_mean
from ..recipe.reader import read_yaml

Value = TypeVar("Value", str, float)


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        name: what is typed.
        summary: one line for `--help`.
        add_arguments: declares its arguments.
        work: `module:function` of `work/`, which does the work and returns what is printed on standard output; progress
            goes to standard error. It is imported, and PyTorch with it, after `read`.
        read: what the work is given, from what was typed. Mistakes in a recipe or a `--config` are found here.
    """

    name: str
    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    work: str
    read: Callable[[Namespace], Any] = lambda arguments: arguments


class Options:
    """A command's options, declared once: `add` them, then `read` what was given; what is typed wins over the file.

    An option may be `required`, and a `pairs` option takes NAME=VALUE any number of times (a mapping in the file).
    """

    def __init__(self) -> None:
        self._declared: dict[str, dict[str, Any]] = {}

    def add(self, name: str, *, default: Any = None, required: bool = False, pairs: bool = False, **flag: Any) -> None:
        """Declare an option; `flag` is what argparse's `add_argument` takes."""
        self._declared[name] = {"default": default, "required": required, "pairs": pairs, "flag": flag}

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare them all to argparse, and `--config`."""
        parser.add_argument("--config", metavar="FILE", help="a YAML file with any of the following; flags win")
        for name, option in self._declared.items():
            many: dict[str, Any] = {"action": "append"} if option["pairs"] else {}
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=SUPPRESS, **many, **option["flag"])

    def read(self, arguments: Namespace) -> dict[str, Any]:
        """Every option's value.

        Raises:
            RecipeError: an unreadable file, an unknown field, a required option that is missing, or a malformed pair.
        """
        file = {} if arguments.config is None else read_yaml(arguments.config)
        unknown = sorted(set(file) - set(self._declared))
        if unknown:
            near, known = did_you_mean(unknown, self._declared), ", ".join(self._declared)
            raise RecipeError(f"{arguments.config}: unknown fields {unknown}.{near} Known: {known}.")
        typed = {name: value for name, value in vars(arguments).items() if name in self._declared}
        values = {}
        for name, option in self._declared.items():
            value = typed.get(name, file.get(name, option["default"]))
            if value is None and option["required"]:
                raise RecipeError(f"{name} is missing. Give --{name.replace('_', '-')}, or {name} in a --config file.")
            values[name] = pairs_of(name, value or {}) if option["pairs"] else _checked(name, value, option["flag"])
        return values


def new_file(text: str) -> str:
    """Where a file can be made; argparse calls it, so that no work is done in vain.

    Raises:
        ArgumentTypeError: it is a folder, or nothing can be written there.
    """
    return _new(text, Path.is_dir, "a folder")


def new_folder(text: str) -> str:
    """Where a folder can be made, as `new_file`."""
    return _new(text, Path.is_file, "a file")


def new_picture(text: str) -> str:
    """Where a picture can be drawn, as `new_file`."""
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentTypeError(f"expected the name of a .png, .svg or .pdf to write, got {text!r}")
    return new_file(text)


def _new(text: str, is_other: Callable[[Path], bool], other: str) -> str:
    try:
        path = Path(text)
        if not text or "\0" in text or is_other(path):
            raise ArgumentTypeError(f"expected where to write, got {text!r}, which is {other if text else 'nothing'}")
        parent = path.absolute()
        while not parent.exists():
            parent = parent.parent
        usable = os.access(parent, os.W_OK) and (parent.is_dir() or parent == path.absolute())
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"expected where to write, got {text!r}: {error}") from error
    if not usable:
        raise ArgumentTypeError(f"nothing can be written to {text!r}: {parent} is no folder, or is read-only")
    return text


def pairs_of(option: str, given: Mapping[str, Any] | Sequence[str], kind: type[Value] = str) -> dict[str, Value]:  # type: ignore[assignment]
    """`["a=1", "b=2"]`, or the mapping of a file, as a mapping: the one reader of NAME=VALUE.

    A name ends at the first "=", or at the last one where a number is asked for, as it may be the name of a file.

    Raises:
        RecipeError: no NAME=VALUE, a name that comes twice, or no finite number where one is asked for.
    """
    expected = f"{option} takes NAME={'NUMBER' if kind is float else 'VALUE'}"
    if isinstance(given, Mapping):
        parts = [(name, "" if value is None else str(value)) for name, value in given.items()]
    elif isinstance(given, str):
        raise RecipeError(f"{expected}, any number of times; got {given!r}.")
    else:
        parts = [(t.rpartition("=") if kind is float else t.partition("="))[::2] for t in map(str, given)]
    pairs: dict[str, Value] = {}
    for name, value in parts:
        if not name or not value:
            raise RecipeError(f"{expected}; got {name + value!r}.")
        if name in pairs:
            raise RecipeError(f"{expected}, each name once; {name!r} comes twice.")
        pairs[name] = kind(number_of(option, value) if kind is float else value)
    return pairs


def number_of(option: str, text: str) -> float:
    """A finite number.

    Raises:
        RecipeError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"{option} takes a finite number; got {text!r}.")
    return number


def _checked(name: str, value: Any, flag: Mapping[str, Any]) -> Any:
    """A value of the kind the flag takes: a file may say 5, "5" or 1e-5 (which YAML takes for text)."""
    if value is None or flag.get("action") == "store_true":
        return value
    if "nargs" in flag and (not isinstance(value, Sequence) or isinstance(value, str)):
        value = [value]
    kind, choices = flag.get("type", str), flag.get("choices")
    try:
        read = [kind(item) for item in value] if "nargs" in flag else kind(value)
    except ArgumentTypeError as error:
        raise RecipeError(f"{name}: {error}.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{name} must be {kind.__name__}; got {value!r}.") from error
    wrong = [item for item in (read if "nargs" in flag else [read]) if choices and item not in choices]
    if wrong:
        raise RecipeError(f"{name}: got {wrong}, expected some of: {', '.join(choices or ())}.")
    return read
