"""Text and tasks from the files a recipe names.

In: jsonl files. Out: lists of texts or tasks, cut to a limit where one is set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .fields import Limits


def read_texts(path: str, limit_bytes: int | None = None) -> list[str]:
    """The `text` column of a jsonl file, whole documents up to a number of UTF-8 bytes.

    Raises:
        DataError: no such file, a line without text, or no text at all.
    """
    texts, size = [], 0
    for number, line in _lines(path):
        text = line.get("text")
        if not isinstance(text, str) or not text:
            raise DataError(f"{path}, line {number}: expected a `text` with at least one character; got {text!r}.")
        texts.append(text)
        size += len(text.encode())
        if limit_bytes is not None and size >= limit_bytes:
            break
    return texts


def held_out(path: str, limits: Limits, documents: int | None, seed: int) -> list[str]:
    """Documents to score: drawn at random, in the file's order, each cut to its beginning.

    The first ones of a file are no fair sample: files are sorted by name, topic or length.

    Args:
        path: a jsonl file with a `text` column.
        limits: whose `document_bytes` counts.
        documents: how many; None for all.
        seed: of the draw, the same for every model.

    Raises:
        DataError: as `read_texts`.
    """
    texts = read_texts(path)
    if documents is not None and documents < len(texts):
        texts = [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), documents))]
    cut = limits.document_bytes
    return texts if cut is None else [text.encode()[:cut].decode(errors="ignore") for text in texts]


def read_tasks(path: str, limit: int | None = None) -> list[dict[str, str]]:
    """Tasks of a jsonl file with `prompt` and `answer`.

    Raises:
        DataError: no such file, a line without them, or no task at all.
    """
    tasks = []
    for number, line in _lines(path):
        if not isinstance(line.get("prompt"), str) or not isinstance(line.get("answer"), str):
            raise DataError(f"{path}, line {number}: expected `prompt` and `answer`; got the fields {sorted(line)}.")
        tasks.append(line)
    return tasks[:limit]


def existing(path: str | Path) -> Path:
    """A file that is there.

    Raises:
        DataError: it is not.
    """
    if not Path(path).is_file():
        raise DataError(f"No file {path}. The recipe names it; check the path (relative to the working folder).")
    return Path(path)


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of a jsonl file, at least one."""
    number, found = 0, False
    try:
        with existing(path).open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    line = json.loads(text)
                    if not isinstance(line, dict):
                        raise DataError(f"{path}, line {number}: expected an object; got {type(line).__name__}.")
                    found = True
                    yield number, line
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after line {number}: not a jsonl file in UTF-8: {error}") from error
    if not found:
        raise DataError(f"{path} is empty.")
