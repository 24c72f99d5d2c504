"""The demo's text: interface strings of Home Assistant, one document an integration and a language.

In: `{language: {integration: strings}}`. Out: `{language: {split: documents}}`, where a document is a line of a jsonl
file. Interface strings repeat each other endlessly, so a string that says nothing new in its language is dropped, and
whole integrations are held out, the same ones in every language: nothing of the test text is in the training text.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, str]

SPLITS = ("train", "validation", "test")
FEWEST_WORDS = 3
FEWEST_BYTES = 200

_PLACEHOLDER = re.compile(r"\{[^{}]*\}|https?://\S+")
_WORD = re.compile(r"[^\W\d_]+")


def leaf_strings(tree: Any) -> Iterator[str]:
    """The strings of a translation file, in the file's order."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from leaf_strings(branch)


def words(text: str) -> list[str]:
    """Words in their own case, without placeholders, links, digits and punctuation."""
    return _WORD.findall(_PLACEHOLDER.sub(" ", text))


def normalise(text: str) -> str:
    """What is left of a string once case, digits, placeholders, punctuation and spacing are ignored."""
    return " ".join(words(text)).casefold()


def split_of(integration: str) -> str:
    """5% validation, 10% test, by a hash of the name: the same in every language, on every machine, for ever."""
    bucket = int(hashlib.sha256(integration.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 10 else "validation" if bucket < 15 else "train"


def documents(
    corpus: dict[str, dict[str, list[str]]], translated_from: str = "en"
) -> dict[str, dict[str, list[Document]]]:
    """Deduplicated documents of every language and split.

    A held-out integration counts only where all languages have enough text of it, so that their scores are of the same
    content.
    """
    original = {normalise(string) for strings in corpus[translated_from].values() for string in strings}
    texts = {
        language: _deduplicated(integrations, set() if language == translated_from else original)
        for language, integrations in corpus.items()
    }
    everywhere = set.intersection(*(set(integrations) for integrations in texts.values()))
    result: dict[str, dict[str, list[Document]]] = {}
    for language, integrations in texts.items():
        result[language] = {split: [] for split in SPLITS}
        for integration, text in integrations.items():
            split = split_of(integration)
            if split == "train" or integration in everywhere:
                result[language][split].append({"text": text, "language": language, "source": integration})
    return result


def _deduplicated(integrations: dict[str, list[str]], untranslated: set[str]) -> dict[str, str]:
    """One text an integration, of the strings that say something new and are not `untranslated`."""
    seen = set(untranslated)
    texts = {}
    for integration in sorted(integrations):
        kept = []
        for string in integrations[integration]:
            key = normalise(string)
            if key.count(" ") + 1 >= FEWEST_WORDS and key not in seen:
                seen.add(key)
                kept.append(string)
        text = "\n".join(kept)
        if len(text.encode()) >= FEWEST_BYTES:
            texts[integration] = text
    return texts
