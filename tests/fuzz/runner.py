"""Runs what may go wrong, and counts how: clear errors, tracebacks, files lost.

In: `(label, function)` pairs. Out: a `Tally`. An error is clear if it is the package's own, or the one line with which
a command line ends. A file is lost if it was there before a call that failed and is not as it was.
"""

from __future__ import annotations

import hashlib
import io
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from peft_moe_delta.errors import PeftMoeDeltaError

Case = tuple[str, Callable[[], object]]


@dataclass
class Tally:
    """How the cases ended."""

    tried: int = 0
    accepted: int = 0
    clear: int = 0
    tracebacks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"inputs tried {self.tried}, accepted {self.accepted}, clear errors {self.clear}, "
            f"tracebacks {len(self.tracebacks)}, files lost {len(self.lost)}"
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.tried + other.tried,
            self.accepted + other.accepted,
            self.clear + other.clear,
            self.tracebacks + other.tracebacks,
            self.lost + other.lost,
            self.kinds + other.kinds,
        )


class Files:
    """The files of a folder as they were, read again only where size or time has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = {path: (self._stat(path), self._content(path)) for path in self._files()}

    def changed(self) -> list[str]:
        """Files that are gone or hold something else; what is new does not count."""
        found = []
        for path, (stat, content) in self.seen.items():
            if not path.is_file() or (self._stat(path) != stat and self._content(path) != content):
                found.append(str(path.relative_to(self.folder)))
        return found

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    @staticmethod
    def _stat(path: Path) -> tuple[int, int]:
        return path.stat().st_size, path.stat().st_mtime_ns

    @staticmethod
    def _content(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()


def run(cases: Iterable[Case], guarded: Path | None = None, restore: Callable[[], None] = lambda: None) -> Tally:
    """Run every case.

    Args:
        cases: label -> what is called.
        guarded: a folder whose files no failure may touch.
        restore: puts back what a call that went through may have replaced.
    """
    tally = Tally()
    files = None if guarded is None else Files(guarded)
    for label, call in cases:
        tally.tried += 1
        said = io.StringIO()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                call()
        except PeftMoeDeltaError as error:
            _clear(tally, label, str(error))
        except SystemExit as stopped:
            _stopped(tally, label, stopped.code, said.getvalue())
        except BaseException:
            tally.tracebacks.append(f"{label}\n{traceback.format_exc(limit=-4)}")
            if isinstance(sys.exc_info()[1], KeyboardInterrupt):
                raise
        else:
            tally.accepted += 1
            if files is not None and files.changed():
                restore()
                files = Files(files.folder)
            continue
        if files is not None and (changed := files.changed()):
            tally.lost.append(f"{label}: {changed}")
            restore()
            files = Files(files.folder)
    return tally


def _stopped(tally: Tally, label: str, code: object, said: str) -> None:
    """The end of a command: a status by kind, and one error as the last line on standard error."""
    lines = said.splitlines() or [""]
    if code == 0:
        tally.accepted += 1
    elif code in (1, 2, 3, 4) and [line for line in lines if line.startswith("error: ")] == lines[-1:]:
        _clear(tally, label, lines[-1])
    else:
        tally.tracebacks.append(f"{label}\nexit status {code!r}, said {said[-300:]!r}")


def _clear(tally: Tally, label: str, message: str) -> None:
    if "\n" in message and label.startswith("command line"):
        tally.tracebacks.append(f"{label}\nmore than one line: {message!r}")
    else:
        tally.clear += 1
        tally.kinds[message[:40]] += 1
