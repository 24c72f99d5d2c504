from __future__ import annotations

import pytest

from greek import ENGLISH, GREEK, make_tokenizer
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import fertility


def test_counts_by_hand():
    tokenizer = make_tokenizer()
    counts = fertility(["και", "ο η"], tokenizer)  # bytes: every Greek letter is two, the tokenizer knows none
    assert (counts.tokens, counts.words, counts.bytes) == (6 + 5, 3, 6 + 5)
    assert counts.tokens_per_word == pytest.approx(11 / 3)
    assert counts.bytes_per_token == 1


def test_a_language_the_tokenizer_knows_is_cheaper():
    tokenizer = make_tokenizer()
    assert fertility(ENGLISH, tokenizer).tokens_per_word < fertility(GREEK, tokenizer).tokens_per_word / 3


@pytest.mark.parametrize("texts", [[], "one text", ["", " "]])
def test_no_words_are_refused(texts):
    with pytest.raises(DataError, match="list of documents"):
        fertility(texts, make_tokenizer())
