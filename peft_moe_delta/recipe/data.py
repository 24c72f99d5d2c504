"""Text of a recipe: drawn at random, and what stands for it where a step says what it has read.

In: a recipe's sources and limits. Out: documents; hashes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import file_sha256
from ..files import existing, write_text
from ..sources import POOL_BYTES, Source, TextSource, each_text, files_of, is_on_hub, pool, read_texts, source_of
from ..sources.hub import revision_of
from .fields import Limits

_LARGE = 2**26  # bytes


def held_out(source: str | TextSource, language: str, limits: Limits, documents: int | None, seed: int) -> list[str]:
    """Documents to score: drawn at random, in the file's order, each cut to its beginning.

    Args:
        source: where text is.
        language: its code.
        limits: whose `document_bytes` counts.
        documents: how many; None for all.
        seed: of the draw, the same for every model.

    Raises:
        DataError: as `read_texts`.
    """
    texts = read_texts(source, language=language, documents=documents and pool(documents))
    if documents is not None and documents < len(texts):
        texts = [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), documents))]
    cut = limits.document_bytes
    return texts if cut is None else [text.encode()[:cut].decode(errors="ignore") for text in texts]


def shuffled(source: str | TextSource, language: str, seed: int, pool_bytes: int = POOL_BYTES) -> Iterator[str]:
    """All documents in random order, `pool_bytes` of them at a time: what is not asked for is not read.

    Raises:
        DataError: as `read_texts`.
    """
    rng, held, size = random.Random(seed), list[str](), 0
    for text in each_text(source, language):
        held.append(text)
        size += len(text.encode())
        if size >= pool_bytes:
            rng.shuffle(held)
            yield from held
            held, size = [], 0
    rng.shuffle(held)
    yield from held


def file_hash(path: Path) -> str:
    """What stands for a file: its content.

    Raises:
        DataError: there is no such file.
    """
    return f"sha256:{file_sha256(existing(path))}"


class Hashes:
    """`file_hash`, with those of large files remembered: a model takes a minute to hash, and no time to look at."""

    def __init__(self, memory: Path, *, saves: bool = True, large: int = _LARGE) -> None:
        """
        Args:
            memory: a file that keeps path, size, time of change and hash.
            saves: whether it is written; else only read.
            large: bytes from which on a hash is remembered.
        """
        self._memory, self._saves, self._large = memory, saves, large
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def __call__(self, path: Path) -> str:
        """What stands for a file.

        Raises:
            DataError: there is no such file.
        """
        found, name = existing(path).stat(), str(path.resolve())
        if found.st_size < self._large:
            return file_hash(path)
        seen = [found.st_size, found.st_mtime_ns]
        if name not in self._known or self._known[name][:2] != seen:
            self._known[name] = [*seen, file_hash(path)]
            if self._saves:
                write_text(self._memory, json.dumps(self._known, indent=1))
        return str(self._known[name][2])


def content_of(
    given: str | Source, kind: type[Source] = TextSource, hash_of: Callable[[Path], str] = file_hash
) -> str | dict[str, Any]:
    """What stands for a source: its files' content, a data set's commit, and how rows are chosen. A file has the same
    under any name.

    Raises:
        DataError: there is no such file, or no such data set.
    """
    source = source_of(given, kind)
    files = files_of(source)
    hashes = {path: f"commit {revision_of(path)}" for path in source.paths if is_on_hub(path)}
    if len(files) == 1 and not hashes and not source.options:
        return hash_of(files[0])
    above = os.path.commonpath([file.parent for file in files]) if files else ""
    hashes |= {os.path.relpath(file, above) if len(files) > 1 else "file": hash_of(file) for file in files}
    return {**source.options, "files": hashes}
