"""Several languages as one stream: shares, budgets, an order that comes again, and what is refused."""

import math
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from peft_moe_delta.errors import DataError
from peft_moe_delta.streams import first_tokens, interleave_languages, language_probabilities
from training.common import make_tokenizer


def documents(code, number):
    return Dataset.from_dict({"text": [f"{code} {index}" for index in range(number)]})


def streamed(code, number):
    return documents(code, number).to_iterable_dataset()


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, (0.9, 0.1)), (2.0, (0.75, 0.25)), (math.inf, (0.5, 0.5))],
)
def test_languages_come_as_often_as_their_size_to_a_power(temperature, expected):
    found = language_probabilities({"hu": 900, "el": 100}, temperature)
    assert tuple(found.values()) == pytest.approx(expected)


def test_sizes_of_web_corpora_do_not_overflow():
    found = language_probabilities({"hu": 1e300, "el": 1e-3}, 0.01)
    assert found == {"hu": 1.0, "el": 0.0}


@pytest.mark.parametrize("make", [documents, streamed])
def test_a_stream_has_all_languages_in_one_order(make):
    mixed = interleave_languages(
        {"hu": make("hu", 400), "el": make("el", 100)}, temperature=2, sizes={"hu": 4, "el": 1}, seed=3
    )
    read = [(row["language"], row["text"]) for row in mixed]
    assert read == [(row["language"], row["text"]) for row in mixed]
    assert all(text.startswith(code) for code, text in read)
    hungarian = Counter(code for code, _ in read)["hu"] / len(read)
    # Two thirds, within five standard deviations of a share of so many.
    assert abs(hungarian - 2 / 3) < 5 * math.sqrt(2 / 9 / len(read))
    assert {text for code, text in read if code == "hu"} == {f"hu {index}" for index in range(400)}


def test_everything_once_where_that_is_wanted():
    mixed = interleave_languages(
        {"hu": documents("hu", 30), "el": documents("el", 5)}, stopping_strategy="all_exhausted_without_replacement"
    )
    assert Counter(row["text"] for row in mixed) == Counter(
        [f"hu {i}" for i in range(30)] + [f"el {i}" for i in range(5)]
    )


@pytest.mark.parametrize("make", [documents, streamed])
def test_a_budget_ends_with_the_document_that_reaches_it(make):
    tokenizer = make_tokenizer()
    lengths = [len(tokenizer(text)["input_ids"]) for text in documents("hu", 20)["text"]]
    found = first_tokens(make("hu", 20), sum(lengths[:7]), tokenizer)
    assert isinstance(found, type(make("hu", 20)))
    assert [row["text"] for row in found] == [f"hu {index}" for index in range(7)]
    assert [row["text"] for row in found] == [f"hu {index}" for index in range(7)]  # once more from the start
    more = first_tokens(make("hu", 20), sum(lengths[:7]) + 1, tokenizer)
    assert len(list(more)) == 8


def test_a_budget_counts_ids_where_documents_have_them():
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6]]})
    assert list(first_tokens(data, 4)["input_ids"]) == [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: language_probabilities({}), "at least one language"),
        (lambda: language_probabilities({"hu": 0}), "Leave out a language without text"),
        (lambda: language_probabilities({"hu": 1}, 0), "temperature 0"),
        (lambda: interleave_languages({"hu": streamed("hu", 3)}), "Give `sizes`"),
        (lambda: interleave_languages({"hu": documents("hu", 3)}, sizes={"el": 3}), "one for each language"),
        (lambda: first_tokens(documents("hu", 3), 0, make_tokenizer()), "expected 1 or more"),
        (lambda: first_tokens(documents("hu", 3), 5), "a `tokenizer`"),
        (lambda: list(IterableDataset.from_generator(first_tokens(streamed("hu", 3), 5).__iter__)), "a `tokenizer`"),
    ],
)
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(DataError, match=says):
        call()
