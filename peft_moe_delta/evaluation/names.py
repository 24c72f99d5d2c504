"""What people call a language: `Hungarian` for `hu` and `hun_Latn`.

In: a code. Out: its English name.
"""

from __future__ import annotations

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..languages import read_code


def language_name(code: str) -> str:
    """The English name of a code's language, with a script that is not its usual one and a region, where they are
    stated: `Chinese (Hant)`, `Portuguese (BR)`. What is no code, or is not in the list, stays as it is.

    The list is Whisper's, of 99 languages, which comes with transformers.
    """
    tag = read_code(code)
    if tag is None or (name := LANGUAGES.get(tag.language or "")) is None:
        return code
    tag = tag.simplify_script()  # the usual one need not be said
    stated = [part for part in (tag.script, tag.territory) if part]
    return name.title() + (f" ({', '.join(stated)})" if stated else "")
