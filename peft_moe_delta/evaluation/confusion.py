"""Language confusion: does a model answer in the language it was asked in? (arXiv 2406.20052)

In: responses and the language they should be in. Out: for each response whether every line, and every word, is.

    line pass rate = responses without a line in another language / responses with a counted line
    word pass rate = of those without such a line, the share without an English word (not in languages of Latin script)

A line counts from 5 words on; a line whose language cannot be told is one in another language, as in the published
code. Words are ICU's in scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) and what stands between
spaces elsewhere. The paper has a word pass rate for the six languages of its prompts that are not in Latin script; the
reason, that an English word shows by its letters, holds for all such languages, and so do we. Ours: fenced code belongs
to no language and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import regex

from ..errors import DataError
from ..languages import script_of
from .identification import detect_language, label_of

SHORTEST_LINE = 5
"""Words a line must have to be counted."""

SHORTEST_WORD = 4
"""Letters an English word must have to be counted: shorter ones are words elsewhere too."""

_WITHOUT_SPACES = frozenset({"Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr"})  # scripts that ICU can segment
_SEAM = regex.compile(r"(?<=\p{Latin})(?=\p{L})(?!\p{Latin})|(?<=\p{L})(?<!\p{Latin})(?=\p{Latin})")
_FENCE = regex.compile(r"\s*(```|~~~)")
_SPACE = regex.compile(r"[\p{Dash}--\-]", flags=regex.V1)  # dashes part words, hyphens join them
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~\p{Bidi_Control}]", flags=regex.V1)


@dataclass(frozen=True, eq=False)
class ConfusionScore:
    """Booleans, one a response, in the order they came in.

    Attributes:
        counted: it has a line that is long enough to tell its language.
        line_clean: counted, and every such line is in the right language.
        word_clean: line-clean, and without an English word; None in languages of Latin script.
    """

    counted: np.ndarray
    line_clean: np.ndarray
    word_clean: np.ndarray | None

    @property
    def line_pass_rate(self) -> float | None:
        """None where no response was counted."""
        return float(self.line_clean[self.counted].mean()) if self.counted.any() else None

    @property
    def word_pass_rate(self) -> float | None:
        """None where no response is line-clean, or words cannot be told apart by their script."""
        if self.word_clean is None or not self.line_clean.any():
            return None
        return float(self.word_clean[self.line_clean].mean())


def language_confusion(responses: Sequence[str], language: str) -> ConfusionScore:
    """Score responses that should be in one language, a code such as `"hu"` or `"pt-BR"`.

    Raises:
        DataError: no responses, a language that the identifier does not know, or a package of the extra `eval` is
            missing.
    """
    expected = check_can_score(language)
    if isinstance(responses, str) or len(responses) == 0:
        raise DataError("responses: expected a list with at least one text. Pass what the model wrote.")
    script = script_of(language) or "Latn"
    words_matter = script != "Latn"
    segmented = expected if script in _WITHOUT_SPACES else None
    counted, line_clean, word_clean = (np.zeros(len(responses), dtype=bool) for _ in range(3))
    for index, response in enumerate(responses):
        lines = [(line, words) for line in _lines(response) if len(words := _words(line, segmented)) >= SHORTEST_LINE]
        counted[index] = bool(lines)
        line_clean[index] = bool(lines) and all(detect_language(line) == expected for line, _ in lines)
        if words_matter and line_clean[index]:
            word_clean[index] = not any(word in _english_words() for _, words in lines for word in words)
    return ConfusionScore(counted, line_clean, word_clean if words_matter else None)


def check_can_score(language: str) -> str:
    """What the identifier calls a language.

    Raises:
        DataError: it does not know it, so that right answers would count as wrong ones.
    """
    if (label := label_of(language)) is None:
        raise DataError(
            f"language: got {language!r}, expected a code that the language identifier (fastText's lid.176) knows, "
            "such as 'hu', 'hun_Latn' or 'pt-BR'. Language confusion cannot be scored for it: leave its prompts out."
        )
    return label


def _lines(response: str) -> Iterator[str]:
    """Lines without punctuation, those of fenced code left out."""
    fence = None
    for line in response.splitlines():
        if (mark := _FENCE.match(line)) and fence in (None, mark[1]):
            fence = mark[1] if fence is None else None
        elif fence is None:
            yield _PUNCTUATION.sub("", _SPACE.sub(" ", line)).strip()


def _words(line: str, language: str | None) -> list[str]:
    """ICU's words of a language that is written without spaces; what stands between spaces where there is none."""
    if language is None:
        return line.split()
    try:
        from icu4py.breakers import WordBreaker
    except ImportError as error:
        raise DataError(
            f"Words of {language!r} are told apart by icu4py, which is not installed. "
            'pip install "peft-moe-delta[eval]"'
        ) from error
    spaced = _SEAM.sub(" ", line)  # ICU leaves Latin letters within Thai in one word with their neighbours
    return [word for word in WordBreaker(spaced, language) if not word.isspace()]


@lru_cache(maxsize=1)
def _english_words() -> frozenset[str]:
    """Lower-case words of Webster's second edition, the list that Unix systems carry and the paper uses."""
    try:
        from english_words import get_english_words_set
    except ImportError as error:
        raise DataError(
            'The word pass rate needs english-words, which is not installed. pip install "peft-moe-delta[eval]"'
        ) from error
    return frozenset(word for word in get_english_words_set(["web2"]) if word.islower() and len(word) >= SHORTEST_WORD)
