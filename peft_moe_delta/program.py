"""The program's name and version, and whether this process is that program.

Importing the package registers its tuner with PEFT, so it imports PyTorch, which takes seconds. Python imports a
package before any module in it, the command line too, and its help or a misspelt field should not wait for that.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "peft-moe-delta"
VERSION = "0.1.0"


def is_command_line() -> bool:
    """Whether `peft-moe-delta` or `python -m peft_moe_delta` is what is being run.

    Where it cannot tell, the answer is no, and the command line merely starts more slowly.
    """
    program = (sys.argv or [""])[0]
    if program != "-m":
        return Path(program).stem == NAME
    # Python is still looking for the module it was told to run, so that `sys.argv` does not name it yet.
    given = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return next((name for option, name in given if option == "-m"), None) == __package__


def called() -> str:
    """How this program was called, by name: where it is installed is nobody's business."""
    name = Path(sys.argv[0]).name
    return NAME if name == "__main__.py" else name
