"""Proposing tokens and giving them to a tokenizer: what text looks like before and after."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from greek import ENGLISH, GREEK
from peft_moe_delta import propose_tokens
from peft_moe_delta.errors import DataError
from peft_moe_delta.vocabulary import TokenizerGrowth


def grown(tokenizer, tokens):
    copied = copy.deepcopy(tokenizer)
    TokenizerGrowth.plan(copied, tokens).apply(copied)
    return copied


def lengths(tokenizer, texts):
    return [len(tokenizer(text)["input_ids"]) for text in texts]


def test_text_gets_shorter_and_comes_back_the_same(tokenizer):
    tokens = propose_tokens(GREEK, tokenizer, 40)
    after = grown(tokenizer, tokens)
    assert all(new < old / 2 for new, old in zip(lengths(after, GREEK), lengths(tokenizer, GREEK), strict=True))
    for text in (*GREEK, *ENGLISH, "ű 漢字 <eos> mixed και"):
        assert after.decode(after(text)["input_ids"]) == text


def test_each_token_lowers_the_count_and_comes_after_its_parts(tokenizer):
    tokens = propose_tokens(GREEK, tokenizer, 15)
    assert len(tokens) == 15
    counts = [sum(lengths(tokenizer, GREEK))]
    counts += [sum(lengths(grown(tokenizer, tokens[: n + 1]), GREEK)) for n in range(len(tokens))]
    savings = [before - after for before, after in pairwise(counts)]
    assert min(savings) > 0
    assert max(savings) == savings[0]  # most useful first


def test_text_without_new_tokens_is_cut_as_before(tokenizer):
    texts = [*ENGLISH, "then a that 12 ?!"]
    after = grown(tokenizer, propose_tokens(GREEK, tokenizer, 40))
    assert [after(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def test_original_texts_are_protected(tokenizer):
    mixed = [f"{text} zebra zebra" for text in GREEK]
    assert any("ze" in token for token in propose_tokens(mixed, tokenizer, 60))
    tokens = propose_tokens(mixed, tokenizer, 60, original_texts=["a zebra"])
    assert tokens
    after = grown(tokenizer, tokens)
    assert after("a zebra")["input_ids"] == tokenizer("a zebra")["input_ids"]


def test_tokens_that_held_out_text_does_not_use_are_dropped(tokenizer):
    texts = ["και", "ζζζζζζ ζζζζζζ", "και", "και", "και", "και"]  # the first is held out
    letters = "".join(map(str, tokenizer.convert_ids_to_tokens(tokenizer("ζζ")["input_ids"])))
    assert letters not in propose_tokens(texts, tokenizer, 10)
    assert propose_tokens(texts, tokenizer, 10)


def test_a_grown_tokenizer_survives_its_file(tokenizer, tmp_path):
    after = grown(tokenizer, [*propose_tokens(GREEK, tokenizer, 20), " ház"])
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == after.get_vocab()
    for text in (*GREEK, *ENGLISH, "egy ház <eos>"):
        assert again(text)["input_ids"] == after(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text


def test_special_tokens_behind_the_vocabulary_keep_their_ids(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<chat>", "</chat>"]})
    first = len(tokenizer)
    after = grown(tokenizer, propose_tokens(GREEK, tokenizer, 20))
    after.save_pretrained(tmp_path)
    for found in (after, AutoTokenizer.from_pretrained(tmp_path)):
        assert found.convert_tokens_to_ids(["<chat>", "</chat>"]) == [first - 2, first - 1]
        ids = found("<chat>η γάτα</chat>")["input_ids"]
        assert ids[0] == first - 2 and ids[-1] == first - 1 and max(ids) >= first


def test_words_as_text_are_matched_literally(tokenizer):
    growth = TokenizerGrowth.plan(tokenizer, [" γάτα", " ház"])
    assert growth.merges == (None, None)
    assert growth.pieces[0] == tuple(tokenizer(" γάτα")["input_ids"])
    after = copy.deepcopy(tokenizer)
    growth.apply(after)
    assert after(" γάτα ház")["input_ids"] == [growth.first_id, growth.first_id + 1]
    assert after.decode([growth.first_id, growth.first_id + 1]) == " γάτα ház"


def test_other_tokenizers_take_words():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    growth = TokenizerGrowth.plan(tokenizer, ["γάτα"])
    growth.apply(tokenizer)
    assert tokenizer("cat γάτα")["input_ids"] == [1, 2]
    with pytest.raises(DataError, match="WordLevel"):
        propose_tokens(GREEK, tokenizer, 5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "one or more"),
        ([" x", " x"], "1 of them different"),
        (["the"], "known or empty"),
        ([""], "known or empty"),
        (["Ġzebra"], "a merge joins two"),
        (["ház"], "reads its letters as bytes"),
    ],
)
def test_tokens_that_cannot_be_taken_are_refused(tokenizer, tokens, message):
    before = tokenizer.get_vocab()
    with pytest.raises(DataError, match=message):
        TokenizerGrowth.plan(tokenizer, tokens)
    assert tokenizer.get_vocab() == before


@pytest.mark.parametrize(
    ("texts", "count"), [([], 5), ("one text", 5), ([""], 5), (GREEK, 0), (["a", "\ud800"], 5), (["a", None], 5)]
)
def test_nothing_to_propose_from_is_refused(tokenizer, texts, count):
    with pytest.raises(DataError, match=r"list of documents|at least 1|texts\[1\] is no text"):
        propose_tokens(texts, tokenizer, count)
