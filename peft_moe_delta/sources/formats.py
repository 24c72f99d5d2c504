"""The rows of a file, one at a time, whatever its format and compression.

In: a path. Out: where a row stands, for messages, and the row as a mapping from columns to values. The standard library
and pyarrow read them. `datasets` reads the same files, but guesses types: through pandas the document `NA` of a CSV
becomes nothing, a column of dates becomes times, and its errors do not say which row they are about.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, PeftMoeDeltaError
from ..files import existing
from .source import Source

Row = tuple[str, dict[str, Any]]
"""Where it stands, and its columns."""

_LONGEST_FIELD = 2**31 - 1  # of a CSV, in characters; Python stops at 131,072, which documents exceed
_GLANCE = 2**20  # characters of a .txt that are looked through for a blank line
_ROWS = 512  # of a parquet file, in memory at a time


def file_rows(path: Path, source: Source) -> Iterator[Row]:
    """The rows of a file.

    Raises:
        DataError: no such file, one of an unknown format, or a damaged one.
    """
    found = format_of(existing(path))
    if found is None:
        raise DataError(f"{path}: expected a file that ends in {', '.join(KNOWN)}. Convert or rename it.")
    name, compression = found
    try:
        if name == _PARQUET:
            yield from _parquet(path, source)
            return
        # Only line feeds end a line of jsonl, and a csv's quoted fields keep theirs: U+2028 may stand in a text.
        newline = {".txt": None, ".csv": "", ".tsv": ""}.get(name, "\n")
        with (
            _OPENERS[compression](path) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file,
        ):
            yield from _READERS[name](file, str(path))
    except PeftMoeDeltaError:
        raise
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:
        what = f"{name}{compression}"[1:]
        encoding = "" if name == _PARQUET else " in UTF-8"
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no {what} file{encoding}: {reason}. Check the file.") from error


def format_of(path: Path) -> tuple[str, str] | None:
    """Format and compression by a file's name, as `(".jsonl", ".gz")`; None for a name that is not known."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last == _PARQUET:
        return last, ""
    if last and last in _OPENERS:
        before, last = last, before
        return (last, before) if last in _READERS else None
    return (last, "") if last in _READERS else None


def _jsonl(lines: Iterable[str], path: str) -> Iterator[Row]:
    for number, text in enumerate(lines, start=1):
        if text.strip():
            where = f"{path}, line {number}"
            yield where, _object(_parsed(text, where, "a JSON object, {...}, on each line"), where)


def _json(file: IO[str], path: str) -> Iterator[Row]:
    """One list of objects, or an object on each line."""
    beginning: list[str] = []
    for line in file:
        beginning.append(line)
        if line.strip():
            break
    if not "".join(beginning).lstrip().startswith("["):
        yield from _jsonl(itertools.chain(beginning, file), path)
        return
    for number, row in enumerate(_parsed("".join([*beginning, *file]), path, "a list of JSON objects"), start=1):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


def _csv(file: IO[str], path: str) -> Iterator[Row]:
    """A header and rows; what separates columns is what the header has most of: commas, semicolons or tabs."""
    csv.field_size_limit(_LONGEST_FIELD)
    header = file.readline()
    rows = csv.DictReader(itertools.chain([header], file), delimiter=max(",;\t", key=header.count), strict=True)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if None in row:
            raise DataError(f"{where}: more fields than the header has columns. Put text with commas in quotes.")
        yield where, row


def _txt(file: IO[str], path: str) -> Iterator[Row]:
    """A document ends at a blank line; where there is none for a long while, at the end of each line."""
    seen: list[str] = []
    size = 0
    for line in file:
        seen.append(line)
        size += len(line)
        if size > _GLANCE or (not line.strip() and any(before.strip() for before in seen)):
            break
    lines = itertools.chain(seen, file)
    paragraphs = any(not line.strip() for line in seen) and size <= _GLANCE
    documents = _paragraphs(lines) if paragraphs else (line.strip("\n") for line in lines)
    for number, text in enumerate((text for text in documents if text.strip()), start=1):
        yield f"{path}, document {number}", {"text": text}


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "".join(group).strip("\n")


def _parquet(path: Path, source: Source) -> Iterator[Row]:
    """A file of columns, of which only those that count are read."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        there = file.schema_arrow.names
        wanted = [name for name in there if name in source.columns]
        columns = wanted if set(source.required) <= set(wanted) else None  # else the message lists all there are
        rows = (row for batch in file.iter_batches(_ROWS, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row


def _zstandard(path: Path) -> Any:
    from pyarrow import input_stream

    return input_stream(str(path), compression="zstd")


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected {expected}: {error}") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object; got {type(row).__name__}.")
    return row


_PARQUET = ".parquet"
_READERS: dict[str, Callable[[IO[str], str], Iterator[Row]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _txt,
}  # fmt: skip
_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"), ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard,
}  # fmt: skip
KNOWN = (*_READERS, _PARQUET)
"""What files of text end in; all but the last may be followed by .gz, .bz2, .xz or .zst."""
