"""Language confusion: does a model answer in the language it was asked in? (arXiv 2406.20052)

In: responses and the language they should be in. Out: for each response whether every line, and every word, is.

    line pass rate = responses without a line in another language / responses with a counted line
    word pass rate = of those without such a line, the share without an English word (not in languages of Latin script)

The rules are those of the published code: a line counts from 5 words on, a line whose language cannot be told is one in
another language, and code is text like any other. Three things differ, as they must: the identifier is the small form
of lid.176; words of scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are ICU's, where the paper
has jieba's and MeCab's; and English words are those of Webster's second edition, which has few inflected forms, so that
its rate bears another name (`word_pass_rate_web2`) and is up to 0.05 higher. With the paper's list and splitters, which
can be handed in, its rates come out. The paper has a word pass rate for the six languages of its prompts that are not
in Latin script; the reason, that an English word shows by its letters, holds for all such languages, and so do we.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import regex

from ..documents import check_documents
from ..errors import DataError
from ..languages import script_of
from .identification import SURE, detect_language, label_of

SHORTEST_LINE = 5
"""Words a line must have to be counted."""

SHORTEST_WORD = 4
"""Letters an English word must have to be counted: shorter ones are words elsewhere too."""

_WITHOUT_SPACES = frozenset({"Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr"})  # scripts that ICU can segment
_SEAM = regex.compile(r"(?<=\p{Latin})(?=\p{L})(?!\p{Latin})|(?<=\p{L})(?<!\p{Latin})(?=\p{Latin})")
_PUNCTUATION = str.maketrans({**dict.fromkeys(string.punctuation), "—": " ", "،": None})
_NEXT_QUESTION = "\nQ:"  # where a base model goes on with the next question of its few-shot prompt


@dataclass(frozen=True, eq=False)
class ConfusionScore:
    """Booleans, one a response, in the order they came in.

    Attributes:
        counted: it has a line that is long enough to tell its language.
        line_clean: counted, and every such line is in the right language.
        word_clean: line-clean, and without an English word; None in languages of Latin script.
        english: what the list of English words is called: `"web2"`, or `"given"`.
    """

    counted: np.ndarray
    line_clean: np.ndarray
    word_clean: np.ndarray | None
    english: str = "web2"

    @property
    def definition(self) -> str:
        """How the rates came about."""
        words = "" if self.word_clean is None else f"; English words are those of the {self.english} list"
        return f"lines of {SHORTEST_LINE} words or more, their language by lid.176 (small) above {SURE}{words}"

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

    @property
    def word_metric(self) -> str:
        """The name of the word pass rate: the paper's only where its list of words was given."""
        return "word_pass_rate" if self.english == "given" else f"word_pass_rate_{self.english}"


def language_confusion(
    responses: Sequence[str],
    language: str,
    *,
    english: Collection[str] | None = None,
    split: Callable[[str], Iterable[str]] | None = None,
) -> ConfusionScore:
    """Score responses that should be in one language, a code such as `"hu"` or `"pt-BR"`.

    Args:
        responses: what the model wrote.
        language: what it should be in.
        english: English words, of which lower-case ones of 4 letters or more count; None for Webster's. The paper's are
            the file `words` of github.com/for-ai/language-confusion.
        split: how a line is cut into words; None for ICU's words in scripts without spaces, and for what stands between
            spaces elsewhere.

    Raises:
        DataError: no responses, a language that the identifier does not know, or a package of the extra `eval` is
            missing.
    """
    expected = check_can_score(language)
    responses = check_documents(responses, "responses", blank=True)
    script = script_of(language) or "Latn"
    if split is None:
        split = partial(_icu_words, language=expected) if script in _WITHOUT_SPACES else str.split
    forbidden = frozenset() if script == "Latn" else _english_words() if english is None else _long_words(english)
    counted, line_clean, word_clean = (np.zeros(len(responses), dtype=bool) for _ in range(3))
    for index, response in enumerate(responses):
        lines = [(line, words) for line in _lines(response) if len(words := list(split(line))) >= SHORTEST_LINE]
        counted[index] = bool(lines)
        line_clean[index] = bool(lines) and all(detect_language(line) == expected for line, _ in lines)
        word_clean[index] = line_clean[index] and not any(
            word.strip() in forbidden for _, words in lines for word in words
        )
    return ConfusionScore(
        counted,
        line_clean,
        None if script == "Latn" else word_clean,
        "web2" if english is None else "given",
    )


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
    """Lines without ASCII punctuation."""
    yield from response.split(_NEXT_QUESTION)[0].strip().translate(_PUNCTUATION).split("\n")


def _icu_words(line: str, language: str) -> list[str]:
    """ICU's words of a language that is written without spaces."""
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
    """Those of Webster's second edition, the list that Unix systems carried."""
    try:
        from english_words import get_english_words_set
    except ImportError as error:
        raise DataError(
            'The word pass rate needs english-words, which is not installed. pip install "peft-moe-delta[eval]"'
        ) from error
    return _long_words(get_english_words_set(["web2"]))


def _long_words(words: Iterable[str]) -> frozenset[str]:
    return frozenset(word for word in words if word.islower() and len(word) >= SHORTEST_WORD)
