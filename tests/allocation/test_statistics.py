"""`LanguageStatistics`: figures by hand, a file that reads back, and files that do not fit."""

import json

import numpy as np
import pytest

from allocation.measured import STATISTICS
from peft_moe_delta.allocation import LanguageStatistics
from peft_moe_delta.errors import DataError, LanguageError


def test_deviation_is_the_norm():
    assert {code: row.tolist() for code, row in STATISTICS.deviation().items()} == {
        "en": [2.0, 3.0],
        "hu": [2.0, 4.0],
        "el": [1.0, 2.0],
    }


def test_cosines_are_of_the_concatenated_vectors():
    both = STATISTICS.between_languages("deviation")
    assert both["en"]["hu"] == pytest.approx((2 + 3) / np.sqrt((4 + 9) * (4 + 16)))
    assert both["hu"]["en"] == both["en"]["hu"] and both["el"]["el"] == 1
    one = STATISTICS.between_languages("deviation", layers=[1])
    assert one["el"]["en"] == pytest.approx(1 / 6)


def test_the_file_reads_back(tmp_path):
    STATISTICS.save(tmp_path / "new" / "statistics.json")
    again = LanguageStatistics.load(tmp_path / "new" / "statistics.json")
    for name in ("languages", "layers", "model", "settings"):
        assert getattr(again, name) == getattr(STATISTICS, name)
    for source, gram in STATISTICS.grams.items():
        np.testing.assert_array_equal(again.grams[source], gram)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["statistics.json"]


def test_statistics_of_one_model_merge():
    parts = [
        LanguageStatistics(STATISTICS.languages, STATISTICS.layers, {source: gram}, STATISTICS.model)
        for source, gram in STATISTICS.grams.items()
    ]
    assert set(parts[0].merged(parts[1]).grams) == {"similarity", "deviation"}
    other = LanguageStatistics(("en", "hu", "el"), (0,), {}, STATISTICS.model)
    with pytest.raises(DataError, match="statistics of layers \\[0, 1\\] and \\[0\\]"):
        parts[0].merged(other)
    with pytest.raises(DataError, match="two models"):
        parts[0].merged(LanguageStatistics(("en", "hu", "el"), (0, 1), {}, {"name": "another"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ["en"]}, "two or more"),
        ({"languages": ["en", "hu", "hu"]}, "each once"),
        ({"layers": [0, 1, 2]}, "expected finite ones of shape \\(3, 3, 3\\)"),
        ({"similarity": [[[1, float("nan"), 1]] * 3] * 2}, "expected finite"),
        ({"similarity": [[1, 2], [3]]}, "Not language statistics"),
        ({"layers": None}, "Not language statistics"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_whose_parts_do_not_fit_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        LanguageStatistics.from_json(json.dumps({**json.loads(STATISTICS.to_json()), **change}))


def test_what_was_not_measured_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no 'gradients', only: similarity, deviation"):
        STATISTICS.between_languages("gradients")
    with pytest.raises(LanguageError, match="'fi'\\] were not measured"):
        STATISTICS.similarity(["fi", "hu"])
    with pytest.raises(DataError, match="layers: got \\[7\\]"):
        STATISTICS.between_languages("similarity", layers=[7])
    with pytest.raises(DataError, match="No file"):
        LanguageStatistics.load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="expected some of: similarity"):
        LanguageStatistics(("en", "hu"), (0,), {"guess": np.ones((1, 2, 2))})
