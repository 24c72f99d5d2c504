"""Text of several languages as one stream: how often each language comes, and how much of it.

In: a data set for each language, in memory or streamed, of the `datasets` library. Out: one data set with a `language`
column, for `LanguageCollator`. Its order is a function of the seed, so a training that Trainer resumes goes on where it
was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, interleave_datasets
from transformers import PreTrainedTokenizerBase

from .errors import DataError

Documents: TypeAlias = "Dataset | IterableDataset"


def language_probabilities(sizes: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """How often a document of each language is drawn: `p_l` proportional to `n_l ** (1 / temperature)`.

    1 keeps the languages' own shares, more gives small languages more: with 5 a language of a thousandth of the text
    comes a quarter as often as the large one. (XLM-R, arXiv 1911.02116, writes `alpha` for `1 / temperature`.)

    Args:
        sizes: language -> how much text there is, in any one unit.
        temperature: above 0; infinity makes all languages equal.

    Raises:
        DataError: no language, a size that is not above 0, or a temperature that is not.
    """
    if not sizes or not all(0 < size < float("inf") for size in sizes.values()) or not temperature > 0:
        raise DataError(
            f"Got sizes {dict(sizes)} and temperature {temperature}; expected at least one language, and finite "
            "numbers above 0. Leave out a language without text."
        )
    largest = max(sizes.values())
    weights = {code: float(size / largest) ** (1 / temperature) for code, size in sizes.items()}
    total = sum(weights.values())
    return {code: weight / total for code, weight in weights.items()}


def interleave_languages(
    documents: Mapping[str, Documents],
    *,
    temperature: float = 1.0,
    sizes: Mapping[str, float] | None = None,
    seed: int = 0,
    stopping_strategy: str = "all_exhausted",
) -> Any:
    """One data set of several languages, which come as often as `language_probabilities` says.

    Args:
        documents: language -> documents, all of them `Dataset` or all of them `IterableDataset`, with the same columns.
        temperature: as in `language_probabilities`.
        sizes: language -> how much text there is; None for the numbers of documents, which a stream does not know.
        seed: of the order of languages; documents keep theirs, so shuffle before.
        stopping_strategy: as in `datasets.interleave_datasets`. By default small languages begin again until all of the
            large ones has come; "all_exhausted_without_replacement" has everything once.

    Returns:
        A `Dataset` or `IterableDataset` with a column `language`.

    Raises:
        DataError: a stream without `sizes`, sizes of other languages, or nothing to draw from.
    """
    streams = [code for code, found in documents.items() if not isinstance(found, Dataset)]
    if sizes is None and streams:
        raise DataError(
            f"{', '.join(streams)}: a streamed data set does not know its size. Give `sizes`, for example "
            "{'hu': 1e9, 'el': 2e8}, in bytes, documents or whatever is known of all."
        )
    found = {code: len(data) for code, data in documents.items()} if sizes is None else dict(sizes)
    if found.keys() != documents.keys():
        raise DataError(
            f"`sizes` are of {sorted(found)}, `documents` of {sorted(documents)}. Give one for each language."
        )
    shares = language_probabilities(found, temperature)
    strategy: Any = stopping_strategy
    return interleave_datasets(
        [_named(documents[code], code) for code in documents],
        probabilities=[shares[code] for code in documents],
        seed=seed,
        stopping_strategy=strategy,
    )


def first_tokens(documents: Documents, tokens: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Documents:
    """The first documents, as many as have at least so many tokens: a language's budget.

    Args:
        documents: with `input_ids`, or with `text` to tokenise.
        tokens: how many; the document that reaches them is the last.
        tokenizer: for documents with `text`.

    Returns:
        Of the kind that was given. A stream counts as it goes, and again from the start when it is resumed.

    Raises:
        DataError: a budget below 1, or documents with text and no tokenizer.
    """
    if tokens < 1:
        raise DataError(f"`tokens`: got {tokens}, expected 1 or more. Leave the language out instead.")
    if isinstance(documents, Dataset):
        return documents.select(range(sum(1 for _ in _within(documents, tokens, tokenizer))))
    return IterableDataset.from_generator(partial(_within, documents, tokens, tokenizer), features=documents.features)


def _within(documents: Any, tokens: int, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Any]:
    for document in documents:
        yield document
        tokens -= _length(document, tokenizer)
        if tokens <= 0:
            return


def _length(document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> int:
    if document.get("input_ids") is not None:
        return len(document["input_ids"])
    if tokenizer is None or not isinstance(document.get("text"), str):
        raise DataError(
            f"A document has the columns {sorted(document)}; expected `input_ids`, or `text` and a `tokenizer` to "
            "count its tokens with."
        )
    return len(tokenizer(document["text"])["input_ids"])


def _named(documents: Any, code: str) -> Any:
    return documents.map(partial(_with_language, code=code))


def _with_language(document: Mapping[str, Any], code: str) -> dict[str, str]:
    return {"language": code}
