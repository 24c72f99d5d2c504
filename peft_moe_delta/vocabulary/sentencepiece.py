"""`tokenizer.model`, SentencePiece's own file, kept through growth and saving.

In: the file of a tokenizer, and the tokenizer with tokens behind those of the file. Out: the file with these tokens as
pieces. llama.cpp's converter reads it where there is one and takes wrong tokens where it got lost; transformers reads
and writes `tokenizer.json` alone.

The file is a protocol buffer (sentencepiece_model.proto): field 1 a piece {1: text, 2: score, 3: type}, any number of
times, field 2 how it was trained {3: algorithm, 4: number of pieces}. Two such messages one after the other are one
message with the pieces of both, so new pieces go behind what is there, which stays as it is.

SentencePiece joins the neighbours whose join has the highest score. Tokens that come after the others, with lower
scores in their order, are thus joined as our merges of lowest priority are (see `growth`).
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .growth import backend_of

FILE = "tokenizer.model"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of pieces: of ordinary text; that text never becomes; that are found before anything is joined."""
_PIECE, _TRAINER = 1, 2
_TEXT, _SCORE, _TYPE = 1, 2, 3
_ALGORITHM, _NUMBER = 3, 4
_UNIGRAM, _BPE = 1, 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5
_WIDTHS = {1: 8, _FLOAT: 4}


class Piece(NamedTuple):
    """One piece; its id is its place."""

    text: str
    score: float
    kind: int


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, source: str | Path | None = None) -> None:
    """`tokenizer.save_pretrained(folder)`, and `tokenizer.model` with every token of the tokenizer.

    Args:
        tokenizer: a fast tokenizer, grown or not.
        folder: where to write.
        source: the folder that it was loaded from; None where the tokenizer knows its file.

    Where the file cannot say what the tokenizer does, it is left out with a warning.
    """
    file = Path(source) / FILE if source is not None else Path(getattr(tokenizer, "vocab_file", None) or FILE)
    content = file.read_bytes() if file.name == FILE and file.is_file() else None
    tokenizer.save_pretrained(folder)
    target = Path(folder) / FILE
    try:
        if content is not None:
            target.write_bytes(with_new_pieces(content, tokenizer))
    except DataError as error:
        target.unlink(missing_ok=True)
        warnings.warn(f"{FILE} was left out: {error} Engines read tokenizer.json instead.", stacklevel=2)


def with_new_pieces(content: bytes, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The file with a piece for every token that stands behind its own.

    Raises:
        DataError: no SentencePiece model, not this tokenizer's, or one that cannot hold the tokens.
    """
    pieces, algorithm = read_pieces(content)
    added = backend_of(tokenizer).get_added_tokens_decoder()
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if wrong := [i for i, piece in enumerate(pieces) if i not in added and tokens.get(i) != piece.text]:
        raise DataError(f"piece {wrong[0]} is {pieces[wrong[0]].text!r}, the tokenizer's is {tokens.get(wrong[0])!r}.")
    score = min(piece.score for piece in pieces)
    found = b""
    for index in range(len(pieces), max(tokens) + 1):
        if index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
            found += _piece(Piece(added[index].content.replace(" ", "▁"), 0.0, kind))
        elif index in tokens and algorithm == _BPE:
            score -= 1
            found += _piece(Piece(tokens[index], score, NORMAL))
        else:
            raise DataError(f"it has no place for {tokens.get(index)!r}, token {index}, as its pieces are not merged.")
    number = _field(_NUMBER, _VARINT) + _varint(max(tokens) + 1)
    return content + found + _message(_TRAINER, number) if found else content


def read_pieces(content: bytes) -> tuple[list[Piece], int]:
    """The pieces of a file, and which algorithm cuts text into them.

    Raises:
        DataError: it is no SentencePiece model.
    """
    pieces, algorithm = [], _UNIGRAM
    try:
        for number, value in _fields(content):
            if number == _PIECE:
                inner = dict(_fields(value))
                (score,) = struct.unpack("<f", inner.get(_SCORE, bytes(4)))
                pieces.append(Piece(inner[_TEXT].decode(), score, int.from_bytes(inner.get(_TYPE, b"\1"), "little")))
            elif number == _TRAINER:
                algorithm = int.from_bytes(dict(_fields(value)).get(_ALGORITHM, bytes([algorithm])), "little")
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise DataError("it is no SentencePiece model.") from error
    if not pieces:
        raise DataError("it is no SentencePiece model.")
    return pieces, algorithm


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, value) of a message's fields; a number's value is its bytes, the lowest first."""
    at = 0
    while at < len(content):
        key, at = _read_varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _read_varint(content, at)
            yield number, value.to_bytes(10, "little")
            continue
        size, at = _read_varint(content, at) if kind == _BYTES else (_WIDTHS[kind], at)
        if at + size > len(content):
            raise ValueError("the last field is cut off")
        yield number, content[at : at + size]
        at += size


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that starts there, seven bits in a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise ValueError("no number")


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _field(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _message(number: int, content: bytes) -> bytes:
    return _field(number, _BYTES) + _varint(len(content)) + content


def _piece(piece: Piece) -> bytes:
    score = _field(_SCORE, _FLOAT) + struct.pack("<f", piece.score)
    return _message(_PIECE, _message(_TEXT, piece.text.encode()) + score + _field(_TYPE, _VARINT) + _varint(piece.kind))
