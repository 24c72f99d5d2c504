"""What a server is asked: short sentences in several languages and scripts, or the user's own texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..sources import read_texts

SENTENCES: Mapping[str, str] = MappingProxyType(
    {
        "en": "The library by the river opens at nine, and on Mondays it stays closed.",
        "de": "Nach dem Regen roch der Wald nach Harz, und die Wege waren voller Schnecken.",
        "hu": "Budapest két partját kilenc híd köti össze, és este mindegyik fényben úszik.",
        "el": "Το πλοίο φεύγει από τον Πειραιά στις επτά το πρωί και φτάνει στο νησί το μεσημέρι.",
        "ru": "Поезд опоздал на два часа, поэтому мы пили чай на вокзале.",
        "zh": "图书馆在河边，每天早上九点开门，星期一休息。",
    }
)
"""Written for this package."""


@dataclass(frozen=True)
class Prompt:
    """A text in a language."""

    language: str
    text: str


def prompts_of(files: Mapping[str, str | Path]) -> list[Prompt]:
    """The first text of each language's file; the built-in sentences where no file is given.

    Raises:
        DataError: a file is missing or holds no text.
    """
    texts = {language: read_texts(file)[0] for language, file in files.items()} or SENTENCES
    return [Prompt(language, text) for language, text in texts.items()]
