"""What is said about where text or tasks are: a path, and how its rows are read.

In: a path as text, with options behind a `#` where there is no section to write them in, or such a section. Out: a
`TextSource` or a `TaskSource`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from ..kinds import Count, read_fields

Kind = TypeVar("Kind", bound="Source")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows are.

    Attributes:
        path: a file (.txt, .jsonl, .json, .csv, .tsv or .parquet; all but the last also as .gz, .bz2, .xz or .zst), a
            folder of such files, a pattern such as `corpus/*.txt`, a data set on the Hub as `hf://owner/name`, or a
            list of these, read one after another.
        config: the configuration of a data set on the Hub; None means its only one, or its default.
        split: the split of a data set on the Hub.
        limit: how many rows to use, from the beginning; None means all.
        part: which rows to use, so that one file is enough for all: of every ten rows, `test` has the second,
            `validation` the third, and `train` the others. `all` has every row.
    """

    path: str | list[str]
    config: str | None = None
    split: str = "train"
    limit: Count | None = None
    part: Literal["all", "train", "validation", "test"] = "all"

    def has(self, row: int) -> bool:
        """Whether the row of this number, counted from 0, is in the part."""
        return self.part in ("all", {1: "test", 2: "validation"}.get(row % 10, "train"))

    @property
    def paths(self) -> list[str]:
        """One at least."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """All the columns that are looked at, where they exist."""
        return self.required

    @property
    def options(self) -> dict[str, object]:
        """What is said beside the path, where it is not the default."""
        return {
            f.name: value for f in fields(self) if f.name != "path" and (value := getattr(self, f.name)) != f.default
        }

    def __str__(self) -> str:
        return ", ".join(self.paths)


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """Where text is, and which part of it to use, for when a path alone does not say enough.

    Attributes:
        column: the column of the text.
        language_column: the column of each row's language, in codes of any standard. If a file has it, a language reads
            only its own rows, so several languages can share a file. null means to read every row.
    """

    column: str = "text"
    language_column: str | None = "language"

    @property
    def required(self) -> tuple[str, ...]:
        """The column of the text."""
        return (self.column,)

    @property
    def columns(self) -> tuple[str, ...]:
        """That of the text, and that of its language."""
        return (self.column,) if self.language_column is None else (self.column, self.language_column)


@dataclass(frozen=True, kw_only=True)
class TaskSource(Source):
    """Where tasks are, and which part of them to use, for when a path alone does not say enough.

    Attributes:
        prompt: the column of what a model is asked.
        answer: the column of the one right answer.
    """

    prompt: str = "prompt"
    answer: str = "answer"

    @property
    def required(self) -> tuple[str, ...]:
        """The columns of prompts and answers."""
        return (self.prompt, self.answer)


def source_of(given: str | Path | Kind, kind: type[Kind]) -> Kind:
    """What `hu.jsonl` or `all.csv#column=body,limit=5000` says, as the section it is short for.

    Raises:
        RecipeError: an option that does not exist, or a value that it cannot have.
    """
    if isinstance(given, kind):
        return given
    text = str(given)
    path, mark, options = text.rpartition("#")
    if not mark or "=" not in options or os.path.exists(text):
        return kind(path=text)
    said = dict(option.partition("=")[::2] for option in options.split(","))
    values = {name: int(v) if name == "limit" and v.isdecimal() else v or None for name, v in said.items()}
    section: Kind = read_fields(kind, {"path": path, **values}, text)
    return section
