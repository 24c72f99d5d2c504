"""Bits per byte of held-out text: what a model needs to write down a document, whatever its tokenizer or language.

In: a causal language model, its tokenizer, documents. Out: bits and UTF-8 bytes of every document, so that two models
can be compared on the same documents. Perplexity per token says nothing across tokenizers or languages; this does.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..documents import check_documents
from ..errors import DataError
from ..padding import beginning
from .forward import Progress, batches_by_length, evaluating, logits_at


@dataclass(frozen=True, eq=False)
class TextScore:
    """Bits, bytes and tokens of each document, in the order the documents came in.

    Attributes:
        definition: how they were scored, in words that stay with the number.
    """

    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    definition: str

    @property
    def value(self) -> float:
        """Bits per byte of the whole text: long documents weigh more, as they should."""
        return float(self.bits.sum() / self.bytes.sum())


class Window(NamedTuple):
    """A cut of one document: `inputs` go through the model, which is scored on `targets` from position `first` on."""

    document: int
    inputs: list[int]
    targets: list[int]
    first: int


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    language: str | None = None,
    max_length: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> TextScore:
    """Score every token of every document exactly once.

    A document longer than `max_length` tokens is cut in windows of that length, each moving on by `stride` tokens
    (default: a whole window, as lm-evaluation-harness does) and scored only on those; the tokens before them are
    context. `language` is handed to the
    model's forward when given. `progress` wraps the list of batches, e.g. `tqdm.tqdm`.
    """
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise DataError(f"stride: got {stride}, expected 1 to max_length ({max_length}). Lower it, or leave it out.")
    documents = check_documents(documents, "documents", blank=True)
    encoded = list(_encode(tokenizer, documents))
    windows = [window for document, ids in enumerate(encoded) for window in _windows(document, ids, max_length, stride)]
    batches = batches_by_length([len(window.inputs) for window in windows], batch_size)
    bits = np.zeros(len(documents))
    with evaluating(model):
        for batch in progress(batches) if progress else batches:
            _add_bits(model, [windows[index] for index in batch], language, bits)
    return TextScore(
        bits=bits,
        bytes=np.array([len(document.encode()) for document in documents]),
        tokens=np.array([len(ids) - 1 for ids in encoded]),
        definition=f"every token once, in windows of {max_length} tokens that move on by {stride}; every document "
        f"begins with {tokenizer.convert_ids_to_tokens(beginning(tokenizer))}",
    )


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Iterator[list[int]]:
    """Token ids of each document after a beginning token, which is the context of the document's first token."""
    first = beginning(tokenizer)
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    for index, ids in enumerate(encoded):
        if not ids:
            raise DataError(f"documents[{index}]: got no text, expected at least one token. Drop empty documents.")
        yield [first, *ids]


def _windows(document: int, ids: list[int], max_length: int, stride: int) -> Iterator[Window]:
    """Cuts of `ids` of at most `max_length` inputs; position p predicts token p + 1, so the last token is no input."""
    total, done = len(ids) - 1, 0
    while done < total:
        end = min(done + stride if done else max_length, total)
        start = max(0, end - max_length)
        yield Window(document, ids[start:end], ids[start + 1 : end + 1], done - start)
        done = end


def _add_bits(model: nn.Module, windows: list[Window], language: str | None, bits: np.ndarray) -> None:
    """Add the windows' bits to those of their documents."""
    offset = min(window.first for window in windows)
    longest = max(len(window.inputs) for window in windows)
    logits = logits_at(model, [window.inputs for window in windows], range(offset, longest), language)
    for row, window in zip(logits, windows, strict=True):  # one row at a time: a batch in fp32 is a lot of vocabulary
        scored = row[window.first - offset : len(window.inputs) - offset].float()
        targets = torch.tensor(window.targets[window.first :], device=scored.device)
        nats = F.cross_entropy(scored, targets, reduction="none").double().sum().item()
        bits[window.document] += nats / math.log(2)
