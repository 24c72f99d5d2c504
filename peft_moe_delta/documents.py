"""Documents as a caller hands them over: one entry for every function that takes a list of texts.

In: whatever stands where documents are expected. Out: a list, or a stream, of texts that can be written in UTF-8. One
string is a sequence of strings too, and would pass for as many documents as it has characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .errors import DataError


def each_document(texts: Iterable[str], name: str = "texts") -> Iterator[str]:
    """Documents one by one, for text that may not fit in memory.

    Raises:
        DataError: at once where one string, or no list, stands in the place of documents; on its way where one of them
            is no text.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        got = "one string" if isinstance(texts, str | bytes) else f"{type(texts).__name__} ({texts!r:.60})"
        raise DataError(f"{name}: got {got}, expected a list of documents. Put the text in a list.")
    return _checked(texts, name)


def check_documents(texts: Iterable[str], name: str = "texts", *, blank: bool = False) -> list[str]:
    """Documents as a list of one at least.

    Args:
        blank: whether all of them may be white space, as what a model wrote may be.

    Raises:
        DataError: as `each_document`, or there is no text at all.
    """
    documents = list(each_document(texts, name))
    if not documents or not (blank or any(text.strip() for text in documents)):
        got = "only empty ones" if documents else "nothing"
        raise DataError(f"{name}: got {got}, expected a list of documents. Give at least one, with text in it.")
    return documents


def check_languages(texts: Mapping[str, Iterable[str]], name: str = "texts") -> None:
    """Refuse what is no mapping of languages to documents, before any of them is read.

    Raises:
        DataError: no mapping, or one string, or no list, stands in the place of a language's documents.
    """
    if not isinstance(texts, Mapping):
        raise DataError(
            f"{name}: got {type(texts).__name__}, expected languages with documents: {{code: [text, ...]}}."
        )
    for code, documents in texts.items():
        each_document(documents, f"{name}[{code!r}]")


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: one with half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(texts: Iterable[str], name: str) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not is_unicode(text):
            raise DataError(f"{name}[{index}] is no text that can be written in UTF-8: {text!r:.60}. Leave it out.")
        yield text
