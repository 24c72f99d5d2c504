"""Packed documents are strangers: each computes what it computes alone, whoever its neighbours are."""

import pytest
import torch
from torch.nn import functional as F

from builders import FAMILIES, moe_config, pico, token_batch, upcycle
from peft_moe_delta import LanguageCollator
from peft_moe_delta.errors import DataError
from training.common import make_tokenizer

LENGTHS = (4, 3, 6, 2, 7)
CODES = ("en", "hu", "az", "fi", "en")
TOKENS = token_batch(1, sum(LENGTHS))[0].split(LENGTHS)
DOCUMENTS = [{"input_ids": t.tolist(), "language": code} for t, code in zip(TOKENS, CODES, strict=True)]
MIXING = ("falcon", "bloom", "mpt")
"""Families that let packed documents attend to each other."""


ROUNDINGS = 32
"""What is allowed between sums of the same terms in another order, in roundings of the largest value in fp32. Up to 7
are seen, by processor and attention; a neighbour that is not masked moves logits by as much as they are, millions."""


@pytest.fixture(params=[(f, a) for f in ("llama", "gpt2") for a in ("sdpa", "eager")], ids="-".join)
def base(request):
    family, attention = request.param
    return pico(family, attn_implementation=attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_computes_what_it_computes_alone_or_packing_is_refused(family, tokenizer):
    """For every family that is supported; as rows of their own, on either side of padding, they always do."""
    model = upcycle(pico(family), trained=True)
    with torch.no_grad():
        expected = [alone(model, document) for document in DOCUMENTS]
        for side in ("left", "right"):
            batch = LanguageCollator(make_tokenizer(padding_side=side), model)(DOCUMENTS)
            padded = model(**batch)
            for row, mask, document in zip(padded.logits, batch["attention_mask"].bool(), expected, strict=True):
                assert_equal_but_for_rounding(row[mask], document)
            assert_equal_but_for_rounding(padded.loss, mean_loss(expected))
        try:
            batch = LanguageCollator(tokenizer, model, packing=True, max_length=13)(DOCUMENTS)
        except DataError as error:
            assert family in MIXING and "attend to each other" in str(error)
            return
        packed = model(**batch)
    assert family not in MIXING
    assert_equal_but_for_rounding(packed.logits.flatten(0, 1)[: sum(LENGTHS)], torch.cat(expected))
    assert_equal_but_for_rounding(packed.loss, mean_loss(expected))


def mean_loss(expected):
    """Of all tokens that follow another one of their document."""
    losses = [
        F.cross_entropy(logits[:-1], torch.tensor(d["input_ids"][1:]), reduction="sum")
        for logits, d in zip(expected, DOCUMENTS, strict=True)
    ]
    return sum(losses) / (sum(LENGTHS) - len(LENGTHS))


def test_flash_attention_gets_one_row(tokenizer):
    """It looks for documents in `position_ids` where the batch is one row, and nowhere else."""
    collate = LanguageCollator(tokenizer, moe_config(), packing=True, max_length=13)
    rows = collate(DOCUMENTS)
    collate._one_row = True  # as where the model's attention says so
    assert {name: part.tolist() for name, part in collate(DOCUMENTS).items()} == {
        name: part.view(1, -1).tolist() for name, part in rows.items()
    }


def assert_equal_but_for_rounding(actual, expected):
    atol = ROUNDINGS * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def alone(model, document):
    tokens = torch.tensor([document["input_ids"]])
    return model(input_ids=tokens, language=document["language"]).logits[0]


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_packed_logits_equal_each_document_alone(base, tokenizer, routing):
    """Called as a user would call it, without Trainer: nobody turns the cache off."""
    model = upcycle(base, trained=True, routing=routing)
    batch = LanguageCollator(tokenizer, model, packing=True, max_length=sum(LENGTHS) + 3)(DOCUMENTS)
    with torch.no_grad():
        packed = model(**batch).logits[0]
        expected = torch.cat([alone(model, document) for document in DOCUMENTS])
    assert_equal_but_for_rounding(packed[: len(expected)], expected)


def test_a_document_over_two_rows_is_two_documents(base, tokenizer):
    model = upcycle(base, trained=True)
    batch = LanguageCollator(tokenizer, model, packing=True, max_length=5)([DOCUMENTS[4], DOCUMENTS[1]])
    halves = [{**DOCUMENTS[4], "input_ids": DOCUMENTS[4]["input_ids"][part]} for part in (slice(5), slice(5, 7))]
    with torch.no_grad():
        packed = model(**batch).logits.flatten(0, 1)
        expected = torch.cat([alone(model, document) for document in (*halves, DOCUMENTS[1])])
    assert_equal_but_for_rounding(packed, expected)


def test_no_document_sees_another(base, tokenizer):
    model = upcycle(base, trained=True)
    collate = LanguageCollator(tokenizer, model, packing=True, max_length=sum(LENGTHS))
    changed = [{**DOCUMENTS[0], "input_ids": [90, 91, 92, 93]}, *DOCUMENTS[1:]]
    with torch.no_grad():
        before, after = (model(**collate(documents)).logits[0] for documents in (DOCUMENTS, changed))
    assert not before[:4].equal(after[:4])
    assert_equal_but_for_rounding(before[4:], after[4:])


@pytest.mark.parametrize("training", [False, True])
def test_packed_loss_is_the_token_weighted_loss_of_the_documents(tokenizer, training):
    model = upcycle(pico(), trained=True, load_balancing_coef=0.0).train(training)
    batch = LanguageCollator(tokenizer, model, packing=True, max_length=13)(DOCUMENTS)
    assert batch["input_ids"].shape == (2, 13)  # 4 + 3 + 6, 2 + 7 and 4 of padding
    with torch.no_grad():
        losses = [
            F.cross_entropy(alone(model, d)[:-1], torch.tensor(d["input_ids"][1:]), reduction="sum") for d in DOCUMENTS
        ]
    assert_equal_but_for_rounding(model(**batch).loss, sum(losses) / (sum(LENGTHS) - len(LENGTHS)))
