"""Text to score of the files a recipe names.

In: a jsonl file and a recipe's limits. Out: documents.
"""

from __future__ import annotations

import random

from ..files import read_texts
from .fields import Limits


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
