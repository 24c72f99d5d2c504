"""Text to measure on: exactly so many tokens of a language, in rows.

In: a stream of documents. Out: rows of token ids, documents one after another with an end token between them, every row
full but the last. Documents are drawn from a buffer that a seed shuffles, so a stream is read only as far as needed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..documents import each_document
from ..errors import DataError
from ..padding import padded

SHUFFLE_BUFFER = 1000
"""Documents held at a time; the next one is drawn from among them."""


class Batch(NamedTuple):
    """Right-padded rows: `input_ids` and `attention_mask`, int64 (rows, longest)."""

    input_ids: Tensor
    attention_mask: Tensor


def token_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    language: str,
    *,
    tokens: int,
    sequence_length: int,
    seed: int = 0,
) -> list[list[int]]:
    """Rows of `sequence_length` token ids, `tokens` of them in all.

    Raises:
        DataError: the documents have fewer tokens, or a number is below 1.
    """
    if tokens < 2 or sequence_length < 2:
        raise DataError(f"got {tokens} tokens in rows of {sequence_length}, expected 2 or more of either.")
    ids = list(islice(_ids(tokenizer, _shuffled(each_document(documents, f"texts[{language!r}]"), seed)), tokens))
    if len(ids) < tokens:
        raise DataError(
            f"{language}: got text of {len(ids):,} tokens, expected {tokens:,} or more: every language is measured on "
            "as many. Give more text, or measure on fewer tokens."
        )
    return [ids[start : start + sequence_length] for start in range(0, tokens, sequence_length)]


def batches(rows: list[list[int]], batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """The rows, `batch_size` at a time."""
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}, expected 1 or more.")
    return [_batch(rows[start : start + batch_size], device) for start in range(0, len(rows), batch_size)]


def _batch(rows: list[list[int]], device: torch.device | str) -> Batch:
    return Batch(*(part.to(device) for part in padded(rows)))


def _ids(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[int]:
    """The token ids of the documents, an end token after each."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        yield from tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        yield from end


def _shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    rng, stream = random.Random(seed), iter(documents)
    held = list(islice(stream, SHUFFLE_BUFFER))
    while held:
        index = rng.randrange(len(held))
        yield held[index]
        following = next(stream, None)
        if following is None:
            held[index] = held[-1]
            held.pop()
        else:
            held[index] = following
