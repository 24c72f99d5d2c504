"""Which tokens a language is missing.

In: text and a BPE tokenizer. Out: new tokens, most useful first. The tokenizer's own training is continued: the text,
cut as it cuts it today, is the alphabet of a second byte-pair training (by `tokenizers`), so every new token joins two
that are there before it, and none competes with an old merge or can never occur. Where the tokenizer falls back to
bytes, that alphabet has whole characters, and those it does not know come first: each saves all its bytes but one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from ..documents import check_documents
from ..errors import DataError
from .growth import Merge, apply_merges, backend_of, is_bpe, spell

HELD_OUT = 5
"""Every fifth text is kept from the training; a token has to make it shorter too."""
CANDIDATES = 2
"""How many times the tokens asked for are trained, before those that held-out text does not use are dropped."""
_FIRST_LETTER = 0xF0000
"""Private-use characters from here on stand for known tokens in the second training."""

_SPACE = re.compile("(?<!▁)(?=▁)")

Word = tuple[str, ...]


def propose_tokens(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    *,
    original_texts: Sequence[str] = (),
    min_count: int = 2,
) -> list[str]:
    """The tokens that shorten a language's text most, for `extend_vocabulary`.

    Args:
        texts: documents of the new languages; each fifth is held out, so give at least five for the check to happen.
        tokenizer: a fast BPE tokenizer, left as it is.
        num_tokens: how many to return at most.
        original_texts: documents of the original languages that must be cut as before: no token occurs in them.
        min_count: how often a pair of tokens must occur in the text to become one.

    Returns:
        Tokens as the tokenizer spells them; each is the join of two that it knows or that come earlier in the list, or
        a character that it spells as bytes.
        Fewer than `num_tokens` if the text has no more that held-out text uses.

    Raises:
        DataError: no text, no BPE tokenizer, or no token asked for.
    """
    backend = backend_of(tokenizer)
    if not is_bpe(backend):
        raise DataError(
            f"propose_tokens continues the training of a BPE tokenizer; this one is {type(backend.model).__name__}. "
            "Choose words by hand: extend_vocabulary takes any strings."
        )
    if num_tokens < 1:
        raise DataError(f"num_tokens must be at least 1; got {num_tokens}.")
    texts = check_documents(texts)
    original_texts = check_documents(original_texts, "original_texts") if original_texts else ()
    held_out = [text for index, text in enumerate(texts) if len(texts) >= HELD_OUT and index % HELD_OUT == 0]
    training = [text for index, text in enumerate(texts) if len(texts) < HELD_OUT or index % HELD_OUT]
    merges = _train(_words(backend, training), CANDIDATES * num_tokens, min_count)
    protected = _words(backend, original_texts)
    while intruders := _used(merges, protected):
        merges = [merge for merge in merges if merge not in intruders]
    used = _used(merges, _words(backend, held_out)) if held_out else set(merges)
    known = set(tokenizer.get_vocab())
    tokens = _characters(_words(backend, training), _words(backend, held_out), protected, known, min_count)[:num_tokens]
    known |= set(tokens)
    for left, right in merges:
        if (left, right) in used and {left, right} <= known and left + right not in known:
            tokens.append(left + right)
            known.add(left + right)
    return tokens[:num_tokens]


def _characters(
    words: Counter[Word], held_out: Counter[Word], protected: Counter[Word], known: set[str], min_count: int
) -> list[str]:
    """Unknown characters that are common enough and occur in held-out text, by the tokens they save."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for piece in word:
            counts[piece] += 0 if piece in known else count
    kept = {piece for word in held_out for piece in word} or set(counts)
    kept -= {piece for word in protected for piece in word}
    found = [piece for piece, count in counts.items() if count >= max(1, min_count) and piece in kept]
    return sorted(found, key=lambda piece: -counts[piece] * (len(piece.encode()) - 1))


def _words(backend: Tokenizer, texts: Iterable[str]) -> Counter[Word]:
    """The words of a text as known tokens, with their counts; a word is what no token crosses."""
    splitter = backend.pre_tokenizer or pre_tokenizers.Split("▁", "merged_with_next")
    normalise = (lambda text: text) if backend.normalizer is None else backend.normalizer.normalize_str
    spelled: Counter[str] = Counter()
    for text in texts:
        for part, _ in splitter.pre_tokenize_str(normalise(text)):
            # Tokenizers after SentencePiece may see the text as one word, in which ▁ is the space.
            spelled.update(word for word in _SPACE.split(part) if word)
    words: Counter[Word] = Counter()
    for word, count in spelled.items():
        words[tuple(spell(backend, word))] += count
    return words


def _train(words: Counter[Word], num_merges: int, min_count: int) -> list[Merge]:
    """Byte-pair training over known tokens: each is one character to the trainer."""
    pieces = sorted({piece for word in words for piece in word})
    letter = {piece: chr(_FIRST_LETTER + index) for index, piece in enumerate(pieces)}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(pieces) + num_merges, min_frequency=min_count, show_progress=False, special_tokens=[]
    )
    lines = (" ".join(["".join(letter[piece] for piece in word)] * count) for word, count in words.items())
    trained.train_from_iterator(lines, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    spelled = {letter: piece for piece, letter in letter.items()}

    def spell(token: str) -> str:
        return "".join(spelled[letter] for letter in token)

    return [(spell(left), spell(right)) for left, right in merges]


def _used(merges: Sequence[Merge], words: Counter[Word]) -> set[Merge]:
    """The merges that happen somewhere in these words."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    return {merge for word in words for merge in apply_merges(word, ranks)[1]}
