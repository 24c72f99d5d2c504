"""Documents and tasks of a source, row by row.

In: a path, or a `TextSource` or `TaskSource`. Out: texts, or tasks with `prompt` and `answer`. No more is read than is
asked for, so that a file or a data set may be larger than the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..documents import is_unicode
from ..errors import DataError
from ..languages import closest_code
from .formats import Row, file_rows
from .hub import hub_rows
from .places import files_at, is_on_hub
from .source import Source, TaskSource, TextSource, source_of

POOL_BYTES = 2**28
"""Of text that is held at a time to be shuffled."""

_POOL, _POOL_EACH = 10_000, 100
_NAMED = 5  # languages in a message


@dataclass(frozen=True)
class Documents:
    """The texts of a source, read anew each time they are gone through.

    Attributes:
        source: a path, or what else is known about it.
        language: whose rows are wanted, where several languages are in one file.
        limit_bytes: where to stop, if not at the end.
    """

    source: str | Path | TextSource
    language: str | None = None
    limit_bytes: int | None = None

    def __iter__(self) -> Iterator[str]:
        size = 0
        for text in each_text(self.source, self.language):
            yield text
            size += len(text.encode())
            if self.limit_bytes is not None and size >= self.limit_bytes:
                return


def read_texts(
    source: str | Path | TextSource,
    limit_bytes: int | None = None,
    *,
    language: str | None = None,
    documents: int | None = None,
) -> list[str]:
    """The first texts of a source.

    Args:
        source: a path, or what else is known about it.
        limit_bytes: UTF-8 bytes with which to stop, at the end of a document; None for all.
        language: whose rows are wanted, where several languages are in one file.
        documents: how many at the most; None for all.

    Raises:
        DataError: as `each_text`.
    """
    return list(islice(Documents(source, language, limit_bytes), documents))


def each_text(source: str | Path | TextSource, language: str | None = None) -> Iterator[str]:
    """The texts of a source that have a character at least, one by one.

    Raises:
        DataError: no such file, a row without the text's column, a text that is none, or no text at all.
        RecipeError: an option behind `#` that does not exist.
    """
    source = source_of(source, TextSource)
    return islice(_texts(source, language), source.limit)


def pool(documents: int) -> int:
    """Among how many of a file's first documents so many are drawn: the first ones alone would be no fair sample, as
    files are sorted by name, topic or length, and a file may be too long to look at all of it."""
    return max(_POOL, _POOL_EACH * documents)


def read_tasks(source: str | Path | TaskSource, limit: int | None = None) -> list[dict[str, str]]:
    """Tasks with `prompt` and `answer`, and what else their rows have.

    Raises:
        DataError: no such file, a row without them, or no task at all.
        RecipeError: an option behind `#` that does not exist.
    """
    source = source_of(source, TaskSource)
    least = min((number for number in (limit, source.limit) if number is not None), default=None)
    rows = (row for number, row in enumerate(_rows(source)) if source.has(number))
    return [_task(where, row, source) for where, row in islice(rows, least)]


def _texts(source: TextSource, language: str | None) -> Iterator[str]:
    chosen = _Chosen(source.language_column, language)
    found = 0
    for where, row in _rows(source):
        if source.column not in row:
            raise DataError(
                f"{where}: expected a `{source.column}`, and the row has {_columns(row)}. Name the column of the text "
                "with `column`."
            )
        if chosen.has(where, row) and row[source.column] not in (None, ""):
            if source.has(found):
                yield _text(where, row, source.column)
            found += 1
    if not found:
        raise DataError(f"{source} {chosen.others() or 'has no text: every row is empty. Check the file.'}")
    if not any(map(source.has, range(found))):
        raise DataError(f"{source} has no part {source.part!r}, as it has {found} rows. Bring three at the least.")


def _task(where: str, row: dict[str, Any], source: TaskSource) -> dict[str, str]:
    if missing := [name for name in source.required if name not in row]:
        raise DataError(
            f"{where}: expected `{source.prompt}` and `{source.answer}`, and the row has {_columns(row)}. Name the "
            f"column instead of {' and '.join(missing)} with `prompt` or `answer`."
        )
    return {"prompt": _text(where, row, source.prompt), "answer": _text(where, row, source.answer)}


def _text(where: str, row: dict[str, Any], column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: expected text in `{column}`; got {type(text).__name__} ({text!r:.60}).")
    if not is_unicode(text):
        raise DataError(f"{where}: holds half of a surrogate pair, which no tokenizer reads. Mend or leave it out.")
    return text


def _columns(row: dict[str, Any]) -> str:
    return f"the columns {', '.join(map(str, row))}" if row else "no columns"


class _Chosen:
    """Which rows are in the language that is wanted: all, where the first one does not say."""

    def __init__(self, column: str | None, language: str | None) -> None:
        self._column, self._language = (None if language is None else column), language
        self._known: dict[str, bool] = {}
        self._others: Counter[str] = Counter()

    def has(self, where: str, row: dict[str, Any]) -> bool:
        if self._column is None or self._language is None:
            return True
        if self._column not in row:
            if self._known:
                raise DataError(f"{where}: has no `{self._column}`, and rows before it have. Say it in all or in none.")
            self._column = None
            return True
        value = str(row[self._column])
        if value not in self._known:
            self._known[value] = closest_code(value, [self._language]) is not None
        if not self._known[value]:
            self._others[value] += 1
        return self._known[value]

    def others(self) -> str:
        """What was there instead, where nothing was chosen."""
        named = ", ".join(f"{value!r} ({count})" for value, count in self._others.most_common(_NAMED))
        return named and (
            f"has no row in {self._language!r}: its column `{self._column}` has {named}. Name the column that has "
            "codes of languages with `language_column`, or null where a row's language is that of its file."
        )


def _rows(source: Source) -> Iterator[Row]:
    """The rows of every path.

    Raises:
        DataError: one of them has none.
    """
    for path in source.paths:
        empty = True
        places = [hub_rows(path, source)] if is_on_hub(path) else (file_rows(f, source) for f in files_at(path))
        for rows in places:
            for row in rows:
                empty = False
                yield row
        if empty:
            raise DataError(f"{path} is empty.")
