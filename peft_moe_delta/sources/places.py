"""The files that a source means.

In: a `Source`. Out: its files in order; a folder's and a pattern's by name, so that every run reads the same text in
the same order.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from ..errors import DataError
from ..files import existing
from .formats import KNOWN, format_of
from .source import Source

HUB = "hf://"


def is_on_hub(path: str) -> bool:
    """Whether a path is that of a data set on the Hub."""
    return path.startswith(HUB)


def files_of(source: Source) -> list[Path]:
    """The local files of a source; none for what is on the Hub.

    Raises:
        DataError: a path leads to no file, or a folder or pattern to none that can be read.
    """
    return [file for path in source.paths if not is_on_hub(path) for file in files_at(path)]


def files_at(path: str) -> list[Path]:
    """The files of one path: a file, a folder or a pattern."""
    if os.path.isdir(path):
        found = sorted(file for file in Path(path).rglob("*") if not _is_hidden(file.relative_to(path)))
    elif not os.path.exists(path) and glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    else:
        return [existing(path)]
    known = [file for file in found if file.is_file() and format_of(file) is not None]
    if not known:
        raise DataError(f"No file of text in {path}. Expected files that end in {', '.join(KNOWN)}.")
    return known


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
