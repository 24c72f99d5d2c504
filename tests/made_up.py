"""Text of made-up languages, each with letters and words of its own, for models and identifiers to tell apart."""

from __future__ import annotations

import random

ALPHABETS = {
    "en": "abcdefghijklm", "hu": "nopqrstuvwáé", "el": "αβγδεζηθικλμ", "ru": "абвгдежзиклм", "de": "äöüßxyzabcd",
    "tr": "çğışöünoprst",
}  # fmt: skip


def documents(code: str, number: int, words: int) -> list[str]:
    """Documents of so many words in a language's own letters, the same ones in every call."""
    drawn = random.Random(code)
    known = ["".join(drawn.choice(ALPHABETS[code]) for _ in range(drawn.randint(4, 7))) for _ in range(90)]
    return [" ".join(drawn.choice(known) for _ in range(words)) for _ in range(number)]
