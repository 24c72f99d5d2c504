"""Files: read with clear errors, and written whole or not at all.

In: paths. Out: the text of a file, or a file under its name once it is complete.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError, DataError


def read_text(path: str | Path) -> str:
    """A text file.

    Raises:
        DataError: there is none, or it is not UTF-8.
    """
    try:
        return existing(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}. Check the file.") from error


def existing(path: str | Path) -> Path:
    """A file that is there.

    Raises:
        DataError: it is not.
    """
    try:
        found = Path(path).is_file()
    except OSError:  # no name that a file can have
        found = False
    if not found:
        raise DataError(f"No file {path}. Check the path (a relative one counts from the working folder).")
    return Path(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: readers see the old file or the new one.

    Raises:
        CheckpointError: the disk is full, or the folder may not be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A file to write, which moves to its place when the block ends without an error, and vanishes otherwise.

    Raises:
        CheckpointError: the disk is full, or the folder may not be written.
    """
    path = Path(path)
    partial = beside(path)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):  # what cannot be reached was not written either
                partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a file or folder that is being written why it cannot be.

    Raises:
        CheckpointError: the disk is full or fails, the place may not be written, or part of its name is a file.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise  # the library's word for a damaged file that was read; of a full disk it says the same
        reason = str(error).partition("] ")[2] or str(error)  # without the error's number
        raise CheckpointError(
            f"Cannot write {path}: {reason}. Nothing was left behind; make room, or choose another folder."
        ) from error


def beside(path: Path) -> Path:
    """A new hidden name in the same folder, so that moving from it is atomic; the suffix says the same format."""
    return path.with_name(f".{path.stem[:80]}.{uuid.uuid4().hex[:8]}{path.suffix}")
