"""How a command ends that failed: a line for people, and a status by kind for scripts.

| status | what happened |
|---|---|
| 1 | the work cannot be done, or a check failed: a plan, a graft or a card that does not hold, a server that differs |
| 2 | the command line, a recipe or another file of settings cannot be read |
| 3 | a file, a model or the Hub: missing, damaged, not to be written, out of reach |
| 4 | out of memory |
| 130 | interrupted, by Ctrl-C or SIGTERM |
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..errors import CheckpointError, DataError, HubError, PeftMoeDeltaError, RecipeError
from .parser import one_line


class CheckFailed(Exception):
    """A check that ran to its end and found a fault: its text is printed as a result is, with status 1."""


class Failure(SystemExit):
    """The end of the process, with a status of the table above."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.code = status


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block, so that whoever has made something temporary removes it. Where
    somebody else handles it, it stays theirs; outside of the main thread, which alone gets signals, nothing is done."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def failure_of(error: BaseException) -> Failure | None:
    """How an error ends that a user or the machine can cause; None for others, whose traceback is wanted."""
    line = f"error: {one_line(error)}"
    if isinstance(error, KeyboardInterrupt):
        told = one_line(error) or "what was finished is kept, what was under way is gone"
        return Failure(f"interrupted: {told}", 130)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return Failure(
            f"error: out of memory: {one_line(error)}. Take smaller batches, shorter sequences or a smaller model.", 4
        )
    if isinstance(
        error, OSError | SafetensorError
    ):  # the disk is full, a folder may not be written, the network is away
        return Failure(f"{line}. Nothing half done was left behind: mend the cause and run it again.", 3)
    if isinstance(error, PeftMoeDeltaError):
        files = isinstance(error, DataError | CheckpointError | HubError)
        return Failure(line, 2 if isinstance(error, RecipeError) else 3 if files else 1)
    return None
