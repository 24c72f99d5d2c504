"""Bits per byte: invariances first, then values worked by hand, then what it refuses."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import bits_per_byte

DOCUMENTS = [
    "the moth",
    "a",
    "Kapcsolódás a hídhoz",
    "Η συσκευή δεν βρέθηκε",
    "the thin thread of the third thing",
    "no",
]


@pytest.fixture
def model(pico_model, byte_tokenizer):
    return pico_model(len(byte_tokenizer))


class Recorder(nn.Module):
    """A model without `logits_to_keep`: uniform over its vocabulary, remembering what it was called with."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls: list[dict] = []

    def forward(self, input_ids, attention_mask=None, language=None):
        self.calls.append({"input_ids": input_ids, "attention_mask": attention_mask, "language": language})
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary_size))


@pytest.mark.parametrize("max_length", [512, 7])
def test_batch_size_and_order_do_not_matter(model, byte_tokenizer, max_length):
    one = bits_per_byte(model, byte_tokenizer, DOCUMENTS, max_length=max_length, batch_size=1)
    for batch_size in (3, 100):
        many = bits_per_byte(
            model, byte_tokenizer, DOCUMENTS[::-1], max_length=max_length, batch_size=batch_size, progress=list
        )
        np.testing.assert_allclose(many.bits[::-1], one.bits, rtol=1e-5)
        np.testing.assert_array_equal(many.bytes[::-1], one.bytes)
        assert many.value == pytest.approx(one.value, rel=1e-5)


@pytest.mark.parametrize("stride", range(1, 9))
def test_every_token_is_scored_once_whatever_the_stride(model, byte_tokenizer, stride):
    """Without attention a prediction depends on one token only, so all ways of cutting must give the same bits."""
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    whole = bits_per_byte(model, byte_tokenizer, DOCUMENTS)
    cut = bits_per_byte(model, byte_tokenizer, DOCUMENTS, max_length=8, stride=stride, batch_size=3)
    np.testing.assert_allclose(cut.bits, whole.bits, rtol=1e-5)


def test_windows_see_the_context_they_are_given(byte_tokenizer):
    model = Recorder(len(byte_tokenizer))
    bits_per_byte(model, byte_tokenizer, ["abcdefghij"], max_length=4, stride=3, batch_size=1)
    seen = sorted(byte_tokenizer.decode(call["input_ids"][0]) for call in model.calls)
    assert seen == sorted(["<bos>abc", "cdef", "fghi"])  # scored: abcd, efg, hij


def test_one_window_equals_the_model_s_own_loss(model, byte_tokenizer):
    ids = torch.tensor([[0, *byte_tokenizer(DOCUMENTS[2], add_special_tokens=False)["input_ids"]]])
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    score = bits_per_byte(model, byte_tokenizer, [DOCUMENTS[2]])
    assert score.bits[0] == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2), rel=1e-5)


def test_uniform_model_by_hand(byte_tokenizer):
    """log2(259) bits a token; "the moth" is 8 bytes in 6 tokens, "híd" is 4 bytes in 4."""
    score = bits_per_byte(Recorder(259), byte_tokenizer, ["the moth", "híd"], max_length=3)
    np.testing.assert_allclose(score.bits, [6 * math.log2(259), 4 * math.log2(259)], rtol=1e-6)
    np.testing.assert_array_equal(score.bytes, [8, 4])
    assert score.value == pytest.approx(10 * math.log2(259) / 12)


def test_end_token_begins_a_document_where_there_is_no_beginning_token(byte_tokenizer):
    byte_tokenizer.bos_token = None
    model = Recorder(len(byte_tokenizer))
    bits_per_byte(model, byte_tokenizer, ["ab"])
    assert model.calls[0]["input_ids"][0, 0] == byte_tokenizer.eos_token_id


def test_language_reaches_the_model_only_when_given(model, byte_tokenizer):
    recorder = Recorder(len(byte_tokenizer))
    bits_per_byte(recorder, byte_tokenizer, ["ab"], language="hu")
    assert recorder.calls[0]["language"] == "hu"
    bits_per_byte(model, byte_tokenizer, ["ab"])  # a plain model takes no such argument


def test_training_flags_are_restored(model, byte_tokenizer):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    bits_per_byte(model, byte_tokenizer, ["ab"])
    assert [module.training for module in model.modules()] == before


def test_peft_model_and_bf16(model, byte_tokenizer):
    plain = bits_per_byte(model, byte_tokenizer, DOCUMENTS)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    np.testing.assert_allclose(bits_per_byte(wrapped, byte_tokenizer, DOCUMENTS).bits, plain.bits, rtol=1e-6)
    half = bits_per_byte(wrapped.to(torch.bfloat16), byte_tokenizer, DOCUMENTS)
    assert half.value == pytest.approx(plain.value, rel=0.05)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "nothing"),
        ("abc", {}, "one string"),
        (["abc", ""], {}, r"documents\[1\]"),
        (["abc"], {"stride": 9, "max_length": 8}, "stride: got 9"),
        (["abc"], {"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_refuses(model, byte_tokenizer, documents, options, message):
    with pytest.raises(DataError, match=message):
        bits_per_byte(model, byte_tokenizer, documents, **options)


def test_refuses_a_tokenizer_without_a_token_to_begin_with(model, byte_tokenizer):
    byte_tokenizer.bos_token = byte_tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a bos nor an eos"):
        bits_per_byte(model, byte_tokenizer, ["abc"])
