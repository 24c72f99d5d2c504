"""The demo's text: interface strings of Home Assistant, one document an integration and a language; for English also
summaries of Wikipedia articles.

In: `{language: {integration: strings}}`. Out: `{language: {split: documents}}`, where a document is a line of a jsonl
file. Interface strings repeat each other endlessly, so a string that says nothing new in its language is dropped, and
whole integrations are held out, the same ones in every language: nothing of the test text is in the training text.

English is what must not be lost, so it is held out as text of another kind than the new languages are learnt from:
training on interface strings of any language makes a model better at interface strings.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, str]

SPLITS = ("train", "validation", "test")
FEWEST_WORDS = 3
FEWEST_BYTES = 200
ARTICLE = "wikipedia: "
"""What the `source` of an encyclopedia's document begins with."""

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


def with_encyclopedia(
    interface: dict[str, list[Document]], articles: dict[str, str], language: str = "en"
) -> dict[str, list[Document]]:
    """Articles to validate and test on; to train on, interface text and about as many bytes of other articles."""
    result: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for title, text in articles.items():
        if len(text.encode()) >= FEWEST_BYTES:
            document = {"text": text, "language": language, "source": ARTICLE + title}
            result[split_of(title)].append(document)
    for lines in result.values():
        lines.sort(key=lambda line: hashlib.sha256(line["source"].encode()).digest())  # the file is in topics
    size = sum(len(line["text"].encode()) for line in interface["train"])
    sizes = itertools.accumulate((len(line["text"].encode()) for line in result["train"]), initial=0)
    enough = sum(before < size for before in sizes)
    return result | {"train": interface["train"] + result["train"][:enough]}


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
