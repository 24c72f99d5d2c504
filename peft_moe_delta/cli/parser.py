"""argparse as this command line has it: errors in one line that suggest what was meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..kinds import did_you_mean


class Parser(argparse.ArgumentParser):
    """Every parser knows `--quiet` and `--verbose`, as it knows `--help`, so that they may stand anywhere."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        said: dict[str, Any] = {"action": "store_const", "dest": "verbosity", "default": argparse.SUPPRESS}
        self.add_argument("--quiet", const="quiet", help="no progress: the result, warnings and errors alone", **said)
        self.add_argument("--verbose", const="verbose", help="other libraries' log, and where an error arose", **said)

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line, instead of below the whole usage."""
        stop = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"error: {one_line(message)}{stop} `{self.prog} --help` lists what there is.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here, where it is known which options there are."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            options = [word for word in left if word.startswith("-")]
            what = f"there is no option {options[0]}" if options else f"one argument too many: {left[0]!r}"
            self.error(f"{what}.{did_you_mean(options[:1], self._option_string_actions)}")
        return found, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices: Sequence[str] = [str(choice) for choice in action.choices]
            near = did_you_mean([value], choices)
            raise argparse.ArgumentError(action, f"got {value!r}, expected one of: {', '.join(choices)}.{near}")


def one_line(error: BaseException | str) -> str:
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """Text that any stream takes: a file's name need not be valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
