"""Rows of a report from hand-made scores of single items."""

from __future__ import annotations

import numpy as np
import pytest

from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation.bits_per_byte import TextScore
from peft_moe_delta.evaluation.compare import (
    all_pairs,
    check_references,
    compare,
    confusion_items,
    status_of,
    task_items,
    text_items,
    transfer,
)
from peft_moe_delta.evaluation.confusion import ConfusionScore
from peft_moe_delta.evaluation.exact_match import TaskScore

GROUPS = {"en": "original", "hu": "uralic"}


def items(bits, correct):
    size = np.array([4, 12])
    return [
        text_items("hu", TextScore(np.array(bits), size, tokens=size, definition="every token")),
        task_items("sorting", "en", TaskScore(correct=np.array(correct), definition="the answer")),
    ]


def test_scores_and_differences_are_those_of_the_items():
    measured = {"before": items([8.0, 24.0], [1.0, 0.0]), "after": items([4.0, 12.0], [1.0, 1.0])}
    scores, differences = compare(measured, GROUPS, all_pairs(measured, ["before"]))
    assert [(s.model, s.task, s.status, s.value, s.items) for s in scores] == [
        ("before", "held-out text", "expanded", 2.0, 2),
        ("before", "sorting", "original", 0.5, 2),
        ("after", "held-out text", "expanded", 1.0, 2),
        ("after", "sorting", "original", 1.0, 2),
    ]
    text, task = differences
    assert (text.model, text.reference, text.value, text.low, text.high) == ("after", "before", -1.0, -1.0, -1.0)
    assert not text.higher_is_better
    assert (task.value, task.low, task.high, task.higher_is_better) == (0.5, 0.0, 1.0, True)


def test_transfer_is_the_bits_saved():
    measured = {"base": items([8.0, 24.0], [0.0, 0.0]), "hungarian": items([4.0, 12.0], [0.0, 0.0])}
    (row,) = transfer(measured, {"hungarian": ["hu"]}, "base")
    assert (row.trained, row.tested, row.gain) == ("hu", "hu", 1.0)


def test_responses_without_a_say_are_left_out():
    counted, clean = np.array([True, True, True, False]), np.array([True, True, False, False])
    score = ConfusionScore(counted, clean, np.array([True, False, False, False]))
    scores, differences = compare({"a": confusion_items("chat", "ru", score)}, GROUPS, [])
    assert [(s.metric, s.value, s.items) for s in scores] == [
        ("line_pass_rate", 2 / 3, 3),
        ("word_pass_rate_web2", 0.5, 2),
    ]
    assert differences == []
    assert confusion_items("chat", "ru", ConfusionScore(~counted & False, clean & False, None)) == []


def test_a_language_is_original_expanded_or_unseen():
    statuses = [status_of(language, GROUPS) for language in ("en", "hu", "fi", None)]
    assert statuses == ["original", "expanded", "unseen", None]


def test_a_missing_reference_is_named():
    with pytest.raises(DataError, match=r"\['base'\], which are none of the models \['a'\]"):
        check_references(["a"], ["base"])
