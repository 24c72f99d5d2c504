"""What a tokenizer makes of a language: tokens a word and bytes a token.

In: texts and a tokenizer. Out: counts and their ratios. A language that takes many more tokens a word than the
original ones is slow and short of context, and is worth new tokens (`propose_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..documents import check_documents


@dataclass(frozen=True)
class Fertility:
    """Sums over texts.

    Attributes:
        tokens: without special ones.
        words: what white space separates; means little where a script writes none between words.
        bytes: in UTF-8.
    """

    tokens: int
    words: int
    bytes: int

    @property
    def tokens_per_word(self) -> float:
        """The fertility proper; English has 1.2 to 1.5 with most tokenizers."""
        return self.tokens / self.words

    @property
    def bytes_per_token(self) -> float:
        """How much text a token carries, comparable across scripts."""
        return self.bytes / self.tokens


def fertility(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Fertility:
    """Count the tokens, words and bytes of texts.

    Raises:
        DataError: there is no word in them.
    """
    texts = check_documents(texts)
    words = sum(len(text.split()) for text in texts)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return Fertility(sum(map(len, encoded)), words, sum(len(text.encode()) for text in texts))
