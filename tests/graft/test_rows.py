"""Rows matched by token string: properties over random vocabularies, then values by hand, then refusals."""

from __future__ import annotations

import pytest
import torch

from peft_moe_delta.errors import GraftError
from peft_moe_delta.graft.arithmetic import graft_tensor
from peft_moe_delta.graft.delta import PostTrainingDelta
from peft_moe_delta.graft.rows import VocabularyMap
from peft_moe_delta.tensors import is_embedding, with_new_rows

BASE = {"<eos>": 0, "a": 1, "b": 2, "c": 3}


def match(post_trained, special=("<eos>",), base=BASE, base_rows=None, rows=None):
    return VocabularyMap.match(
        base,
        post_trained,
        special=special,
        base_rows=base_rows or len(base),
        post_trained_rows=rows or len(post_trained),
    )


def embedding(rows, seed, dtype=torch.float32):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_every_row_is_what_its_token_says(scale, dtype):
    """Renumbered, with two tokens of its own, a special one renumbered and padding on both sides."""
    post = {"b": 0, "<eos>": 1, "a": 2, "<chat>": 3, "c": 4, "own": 5}
    base_rows, rows = embedding(7, 0, dtype), embedding(8, 1, dtype)
    vocabulary = match(post, special=("<eos>", "<chat>"), base_rows=7, rows=8)
    found = graft_tensor(vocabulary.align(base_rows, rows), rows, scale=scale)
    for token in ("a", "b", "c"):
        by_hand = graft_tensor(base_rows[BASE[token]], rows[post[token]], scale=scale)
        assert torch.equal(found[post[token]], by_hand), token
    for token in ("<eos>", "<chat>", "own"):
        assert torch.equal(found[post[token]], rows[post[token]]), token
    assert torch.equal(found[6], graft_tensor(base_rows[6], rows[6], scale=scale))  # padding of both
    assert torch.equal(found[7], rows[7])  # padding of the post-trained model alone
    assert vocabulary.next_id == 6


def test_scale_one_is_the_post_trained_embedding_bit_for_bit():
    post = {"c": 0, "b": 1, "a": 2, "<eos>": 3, "<chat>": 4}
    base, rows = embedding(4, 0), embedding(5, 1)
    assert torch.equal(graft_tensor(match(post).align(base, rows), rows), rows)


def test_one_vocabulary_is_not_copied():
    base, rows = embedding(4, 0), embedding(4, 1)
    assert VocabularyMap.same(4).align(base, rows) is base
    assert match(BASE, special=()).is_same


def test_a_pair_of_checkpoints_with_other_rows_has_a_delta():
    post = {**BASE, "<chat>": 4}
    names = ("model.embed_tokens.weight", "model.norm.weight")
    base = dict(zip(names, (embedding(4, 0), torch.ones(5)), strict=True))
    trained = dict(zip(names, (embedding(5, 1), torch.zeros(5)), strict=True))
    delta = PostTrainingDelta.from_checkpoints(base, trained, match(post))
    found = delta.tensor(names[0])
    torch.testing.assert_close(found[1:4], trained[names[0]][1:4] - base[names[0]][1:4])
    assert not found[[0, 4]].any()  # a special token, and one that the base lacks
    assert torch.equal(delta.tensor(names[1]), -torch.ones(5))
    assert {row.family for row in delta.report().families} == {"embeddings", "norm"}


@pytest.mark.parametrize(("first", "rows"), [(3, 5), (5, 7), (2, 5)])
def test_new_rows_fill_the_padding_and_go_beyond_it(first, rows):
    old, new = embedding(5, 0), embedding(2, 1)
    grown = with_new_rows(old, new, first)
    assert len(grown) == rows
    assert torch.equal(grown[first : first + 2], new)
    assert torch.equal(grown[:first], old[:first])
    assert torch.equal(grown[first + 2 :], old[first + 2 :])


@pytest.mark.parametrize(
    ("post", "arguments", "message"),
    [
        (BASE, {"special": ("<chat>",)}, "special tokens.*<chat>"),
        ({**BASE, "<chat>": 9}, {"special": ("<chat>",), "rows": 5}, "special tokens.*<chat>"),
        (
            BASE,
            {"base_rows": 3},
            "tokenizers differ: 3 of the base's 4 tokens .* base's 3 and",
        ),
        ({"<eos>": 0, "x": 1, "y": 2, "z": 3}, {}, "tokenizers differ.*1 of the base's 4"),
    ],
)
def test_vocabularies_that_do_not_belong_together_are_refused(post, arguments, message):
    with pytest.raises(GraftError, match=message):
        match(post, **arguments)


def test_a_token_without_a_row_is_none_of_the_models():
    """Gemma 3's tokenizer has an image token that is beyond the rows of its text models."""
    letters = {"<eos>": 0, **{chr(97 + index): index + 1 for index in range(19)}}
    base, post = {**letters, "<image>": 20}, {**letters, "<chat>": 20, "<image>": 21, "own": 29}
    vocabulary = match(post, special=("<eos>", "<chat>", "<image>"), base=base, base_rows=20, rows=21)
    assert vocabulary.base_row.tolist() == [-1, *range(1, 20), -1]
    assert vocabulary.next_id == 30


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(GraftError, match="do not fit"):
        match(BASE).align(embedding(3, 0), embedding(4, 1))
    with pytest.raises(GraftError, match="learnt for another model"):
        with_new_rows(embedding(4, 0), embedding(2, 1), 5)


def test_embeddings_are_told_from_what_is_named_alike():
    assert all(map(is_embedding, ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight")))
    assert not any(map(is_embedding, ("transformer.wpe.weight", "transformer.word_embeddings_layernorm.weight")))
