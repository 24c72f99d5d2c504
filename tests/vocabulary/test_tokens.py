"""Proposing tokens and giving them to a tokenizer: what text looks like before and after."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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


@pytest.fixture(params=["prepend", "metaspace"])
def byte_fallback(request):
    """A tokenizer after SentencePiece, as Llama 2's: it knows English, and spells any other character as its bytes."""
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = (
        normalizers.Sequence(space),
        pre_tokenizers.Split("▁", "merged_with_next"),
    )
    trained.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    spec = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *spec["vocab"]]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in spec["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if request.param == "prepend":
        backend.normalizer = normalizers.Sequence(space)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    last = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_bytes_that_stand_for_characters_become_characters_and_words(byte_fallback, tmp_path):
    tokens = propose_tokens(GREEK, byte_fallback, 40, original_texts=ENGLISH)
    assert len(tokens) == 40 and not any("<0x" in token for token in tokens)
    growth = TokenizerGrowth.plan(byte_fallback, tokens)
    assert growth.literal == ()
    assert all(byte_fallback.decode(ids).strip() == t.strip("▁") for t, ids in zip(tokens, growth.pieces, strict=True))
    after = grown(byte_fallback, tokens)
    assert all(new < old / 2 for new, old in zip(lengths(after, GREEK), lengths(byte_fallback, GREEK), strict=True))
    used = {token for text in GREEK for token in after.tokenize(text)} | {t for m in growth.merges if m for t in m}
    assert set(tokens) <= used  # in the text, or part of a token that is
    after.save_pretrained(tmp_path)
    for tokenizer in (after, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (*GREEK, *ENGLISH, "ű 漢字 mixed και"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert [tokenizer(text)["input_ids"] for text in ENGLISH] == [byte_fallback(t)["input_ids"] for t in ENGLISH]


def test_a_character_of_the_original_texts_stays_bytes(byte_fallback):
    tokens = propose_tokens(GREEK, byte_fallback, 40, original_texts=["α and β"])
    assert tokens and not any("α" in token for token in tokens)
    after = grown(byte_fallback, tokens)
    assert after("α and β")["input_ids"] == byte_fallback("α and β")["input_ids"]
