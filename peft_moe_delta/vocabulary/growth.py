"""How a tokenizer takes new tokens.

In: a fast tokenizer and tokens. Out: the tokenizer with these tokens behind its own. A token of a BPE tokenizer that is
one merge away from what is known becomes a merge of lowest priority: text without it is cut as before, and it is never
found inside what an older merge has taken. A tokenizer that falls back to bytes (Llama 2's) spells a character it does
not know as its bytes: such a character becomes a token without a merge, which then takes the place of the bytes. Any
other token is matched literally, as `tokenizer.add_tokens` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerBase

from ..errors import DataError

Merge = tuple[str, str]
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACES = ("Ġ", "▁")
"""How tokenizers spell the space before a word."""


@dataclass(frozen=True)
class TokenizerGrowth:
    """New tokens of one tokenizer, checked but not yet given to it.

    Attributes:
        tokens: as the tokenizer spells them (`Ġκαι`), in the order of their ids.
        first_id: id of the first.
        pieces: ids of the known tokens that make up each.
        merges: the two tokens (known, or new and earlier) that each is merged from; None for other tokens.
        literal: those that are matched literally.
    """

    tokens: tuple[str, ...]
    first_id: int
    pieces: tuple[tuple[int, ...], ...]
    merges: tuple[Merge | None, ...]
    literal: tuple[str, ...]

    @classmethod
    def plan(cls, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> TokenizerGrowth:
        """What giving `tokens` to a tokenizer means; changes nothing.

        Raises:
            DataError: no fast tokenizer; a token is empty, double, known already, cannot be decoded again, or more than
                one merge away.
        """
        backend = backend_of(tokenizer)
        vocabulary = tokenizer.get_vocab()
        wrong = [token for token in tokens if not isinstance(token, str) or not token or token in vocabulary]
        if wrong or not tokens or len(set(tokens)) < len(tokens):
            raise DataError(
                f"new_tokens must be one or more different strings that the tokenizer does not know; got "
                f"{len(tokens)}, {len(set(tokens))} of them different, and known or empty {wrong[:3]}."
            )
        ranks: dict[Merge, int] = {}
        merges: list[Merge | None] = []
        pieces, literal, known = [], [], set(vocabulary)
        for token in tokens:
            parts = apply_merges(spell(backend, token), ranks)[0]
            merge = (parts[0], parts[1]) if len(parts) == 2 and known.issuperset(parts) else None
            if merge is not None:
                ranks[merge] = len(ranks)
            if merge is not None or parts == [token]:
                pieces.append(tuple(piece.id for piece in backend.model.tokenize(token)))
            else:
                _check_literal(backend, token, parts)
                literal.append(token)
                pieces.append(tuple(tokenizer(token, add_special_tokens=False)["input_ids"]))
            merges.append(merge)
            known.add(token)
        if unspelt := [token for token, ids in zip(tokens, pieces, strict=True) if not ids]:
            raise DataError(
                f"new_tokens: the tokenizer spells {unspelt[0]!r} with no token at all, so its row has nothing to "
                "start from. Leave it out."
            )
        return cls(tuple(tokens), max(vocabulary.values()) + 1, tuple(pieces), tuple(merges), tuple(literal))

    def apply(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the tokens to the tokenizer they were planned for, in place.

        Raises:
            DataError: it numbers them otherwise.
        """
        backend = backend_of(tokenizer)
        ids = {token: self.first_id + index for index, token in enumerate(self.tokens)}
        if is_bpe(backend):
            # A tokenizer file numbers its added tokens behind the vocabulary unless they stand in it: so all do now.
            merges = [merge for merge in self.merges if merge is not None]
            backend.model = _grown_bpe(backend, tokenizer.get_vocab() | ids, merges)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.literal])
        found = tokenizer.get_vocab()
        if wrong := [token for token, index in ids.items() if found.get(token) != index]:
            raise DataError(
                f"The tokenizer gives {wrong[0]!r} the id {found.get(wrong[0])}, expected {ids[wrong[0]]}: its ids "
                "have gaps. Use a tokenizer whose ids are consecutive."
            )


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The `tokenizers` object inside.

    Raises:
        DataError: there is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__} has no fast tokenizer inside. Load it by AutoTokenizer.from_pretrained(...), "
            "which reads tokenizer.json."
        )
    return backend


def is_bpe(backend: Tokenizer) -> bool:
    """Whether new tokens can be merges: byte-pair encoding without marks for word parts."""
    model = backend.model
    return isinstance(model, models.BPE) and not model.continuing_subword_prefix and not model.end_of_word_suffix


def spell(backend: Tokenizer, token: str) -> list[str]:
    """A token in the tokenizer's own spelling, cut into known tokens, and into characters where it falls back to
    bytes; empty where it cannot be."""
    if not is_bpe(backend):
        return []
    pieces, held = [], b""
    for piece in backend.model.tokenize(token):
        byte = _BYTE.fullmatch(piece.value) if backend.model.byte_fallback else None
        if byte is None:
            pieces.append(piece.value)
            continue
        held += bytes.fromhex(byte[1])
        with suppress(UnicodeDecodeError):  # until the character is whole
            pieces.append(held.decode())
            held = b""
    return pieces if "".join(pieces) == token else []


def apply_merges(pieces: Sequence[str], ranks: Mapping[Merge, int]) -> tuple[list[str], list[Merge]]:
    """Byte-pair encoding itself: join the pair of lowest rank, from the left, until none is left.

    Returns:
        The tokens, and the merges that happened, each of which made the text one token shorter.
    """
    pieces, done = list(pieces), []
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(pieces)))
        if rank == len(ranks):
            break
        done.append((pieces[at], pieces[at + 1]))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces, done


def _check_literal(backend: Tokenizer, token: str, parts: list[str]) -> None:
    """Refuse what literal matching would find in the wrong text, or decode wrongly."""
    if is_bpe(backend) and parts and token.startswith(_SPACES):
        raise DataError(
            f"The new token {token!r} is made of {len(parts)} tokens, {parts[:6]}; a merge joins two. List its parts "
            "before it, as propose_tokens does, or write it as text, with a plain space, to match it literally."
        )
    decoded = token if backend.decoder is None else backend.decoder.decode([token])
    if decoded.strip() != token.strip():
        raise DataError(
            f"The new token {token!r} would be matched literally and decoded as {decoded!r}: this tokenizer reads its "
            "letters as bytes. Take tokens from propose_tokens, or write it with a space in front."
        )


def _grown_bpe(backend: Tokenizer, vocabulary: dict[str, int], merges: list[Merge]) -> models.BPE:
    """The tokenizer's BPE model with a larger vocabulary and further merges."""
    spec: dict[str, Any] = json.loads(backend.to_str())["model"]
    old: list[Merge] = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in spec["merges"]]
    kept = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
    return models.BPE(vocab=vocabulary, merges=[*old, *merges], **{key: spec[key] for key in kept})
