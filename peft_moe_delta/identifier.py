"""`fit_identifier`: what routing by context knows of each language, counted from its text, without a gradient step.

In: an upcycled model and text of its languages. Out: token counts in the adapter (`tuner/identifier.py` uses them,
`routing/context.py` has the formula), and a report of what they recognise of text that was held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .documents import check_languages, each_document
from .errors import DataError, LanguageError
from .languages import ORIGINAL_GROUP
from .loading import tokenizer_of
from .routing.context import THRESHOLD, recognise, token_scores
from .tuner import MoeDeltaTuner
from .tuner.identifier import Identifiers, columns_of, fitted_of

MEMORIES = (32, 64, 128)
"""Tokens. A longer memory gets over more names and code, a shorter one follows a change of language a little sooner."""

USUAL_MEMORY = 64
"""Where no text is held out to choose by."""

ORIGINAL_WEIGHT = 4.0
"""Of an error on original text, which the graft must leave as it is, beside 1 on other text."""

ENOUGH = 0.9
"""Share of a language's held-out tokens to be recognised, below which its identification is doubtful."""

_EVERY = 10  # documents, of which one is held out
_MOST_HELD_OUT = 100  # documents a language
_LONGEST = 512  # tokens of a held-out document
_CHANGE = 64  # tokens of each language in text that changes its language


@dataclass(frozen=True)
class IdentifierReport:
    """How an identifier was fitted, and what it recognises of every tenth document, which was not counted for this.

    Attributes:
        memory: tokens that are remembered.
        recognised: language -> share of held-out tokens that are taken for it; for an original language, that stay on
            expert 0. Languages without held-out text are left out.
        tokens: language -> tokens counted.
        errors: memory that was tried -> mean share of tokens that went wrong over languages, text that changes its
            language included, original languages weighing 4 times as much.
    """

    memory: int
    recognised: dict[str, float]
    tokens: dict[str, int]
    errors: dict[int, float]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Languages that are hardly recognised."""
        return tuple(
            f"{code!r}: {share:.0%} of held-out tokens are recognised. Give fit_identifier(...) more text of it, like "
            "what the model will see, or name the language in calls."
            for code, share in self.recognised.items()
            if share < ENOUGH
        )


def fit_identifier(
    model: PeftModel,
    texts_by_language: Mapping[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    memory: int | None = None,
) -> IdentifierReport:
    """Teach the active adapter to tell its languages apart, for `routing="context"` and `language="auto"`.

    Tokens are counted, nothing else: no pass of the model, no gradient. 300 kB of text a language are plenty. A
    language that joins later is fitted with its own text alone; what is not given keeps its counts.

    Args:
        model: the upcycled model, under any routing.
        texts_by_language: language code -> documents, streamed, of the kind that the model will see. Every language
            with experts needs some, here or in an earlier fit; and one of the original languages, if there are any.
        tokenizer: None loads the one beside the base model.
        memory: tokens to remember; None for the one of 32, 64 and 128 that errs least on every tenth document, held
            out, and for the one in force where some languages keep their counts.

    Returns:
        What is recognised of the held-out documents. Its doubts go into the adapter's record, and so into the report of
        a graft and the card.

    Raises:
        LanguageError: an unknown language, or one without text.
        DataError: a language without a token, no tokenizer, or a bad `memory`.
    """
    tuner = model.base_model
    assert isinstance(tuner, MoeDeltaTuner)
    if memory is not None and (not isinstance(memory, int) or isinstance(memory, bool) or memory < 1):
        raise DataError(f"memory={memory!r} must be a whole number of tokens from 1 on, or None to have it chosen.")
    check_languages(texts_by_language, "texts_by_language")
    config = tuner.active_config
    tokenizer = tokenizer or tokenizer_of(tuner.model)
    earlier = Identifiers.counts_of(tuner.model, tuner.active_adapters[0])
    _check_languages(config.languages, {**earlier, **texts_by_language})
    counted = {code: _Counts.of(code, texts, tokenizer) for code, texts in texts_by_language.items()}
    vocabulary = max(len(tokenizer), *(len(row) for row in earlier.values()), 1)
    rows = {code: _wide(row, vocabulary) for code, row in earlier.items()}
    known = {code: _wide(found.counted, vocabulary) for code, found in counted.items()}
    original = {code: config.languages[code] == ORIGINAL_GROUP for code in {**rows, **known}}
    held_out = {code: found.held_out for code, found in counted.items() if found.held_out}
    fitted = config.record.identifier
    if memory is None and fitted is not None and not set(fitted.languages) <= set(texts_by_language):
        memory = fitted.memory  # what the others' text is read as must not change
    tried = (memory,) if memory is not None else MEMORIES if held_out else (USUAL_MEMORY,)
    errors, recognised = _try(tried, {**rows, **known}, original, held_out)
    best = min(tried, key=lambda m: (errors.get(m, 0.0), abs(m - USUAL_MEMORY)))
    everything = {code: _wide(found.everything, vocabulary) for code, found in counted.items()}
    Identifiers.fill(tuner.model, tuner.active_adapters[0], config, {**rows, **everything}, best)
    tokens = {code: int(row.clamp(min=0).sum()) for code, row in everything.items()}
    report = IdentifierReport(best, recognised.get(best, {}), tokens, errors)
    config.change(doubts=tuple(dict.fromkeys([*config.record.doubts, *report.doubts])))
    return report


def _check_languages(groups: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """
    Raises:
        LanguageError: an unknown language, or one with experts that has no text; or no original one has.
    """
    unknown = sorted(set(given) - set(groups))
    if unknown:
        raise LanguageError(f"The adapter does not know {unknown}; its languages are {', '.join(groups)}.")
    missing = [code for code, group in groups.items() if group != ORIGINAL_GROUP and code not in given]
    originals = [code for code, group in groups.items() if group == ORIGINAL_GROUP]
    if missing or (originals and not set(originals) & set(given)):
        raise LanguageError(
            f"There is no text of {missing or originals}, so it could not be told from the others. Give documents of "
            f"{'each of these' if missing else 'at least one of these'}."
        )


@dataclass
class _Counts:
    """Tokens of one language: of nine documents in ten, of all, and the tenth ones themselves."""

    counted: Tensor
    everything: Tensor
    held_out: list[list[int]]

    @classmethod
    def of(cls, code: str, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> _Counts:
        counted = torch.zeros(len(tokenizer), dtype=torch.int64)
        tenth, held_out = counted.clone(), list[list[int]]()
        for number, text in enumerate(each_document(texts, f"texts_by_language[{code!r}]")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                continue
            into = tenth if number % _EVERY == _EVERY - 1 else counted
            into += torch.bincount(torch.tensor(ids), minlength=len(into))
            if into is tenth and len(held_out) < _MOST_HELD_OUT:
                held_out.append(ids[:_LONGEST])
        everything = counted + tenth
        if not everything.any():
            raise DataError(f"There is no text of {code!r}. Give at least one document with one token.")
        for row in (counted, everything):
            row[tokenizer.all_special_ids] = -1  # a chat template has them whatever the language
        return cls(counted, everything, held_out)


def _wide(row: Tensor, vocabulary: int) -> Tensor:
    """Counts of a larger vocabulary."""
    return torch.cat([row.long().cpu(), torch.zeros(vocabulary - len(row), dtype=torch.int64)])


def _try(
    memories: Sequence[int],
    counts: Mapping[str, Tensor],
    original: Mapping[str, bool],
    held_out: Mapping[str, list[list[int]]],
) -> tuple[dict[int, float], dict[int, dict[str, float]]]:
    """Memory -> weighted error, and language -> share of held-out tokens that are recognised."""
    if not held_out:
        return {}, {}
    scores = token_scores(torch.stack(list(counts.values())), list(original.values()))
    columns = {code: i for i, code in enumerate((c for c in counts if not original[c]), start=1)}
    errors, recognised = {}, {}
    for memory in memories:
        whole: dict[str, float] = {}
        changing: dict[str, list[float]] = {}
        for code, rows in held_out.items():
            found = [recognise(torch.tensor([row]), scores, memory, THRESHOLD)[0] for row in rows]
            whole[code] = _share(found, columns.get(code, 0))
        for one, other in itertools.permutations(held_out, 2):
            parts = [(a[:_CHANGE], b[:_CHANGE]) for a, b in zip(held_out[one], held_out[other], strict=False)]
            found = [recognise(torch.tensor([a + b]), scores, memory, THRESHOLD)[0, len(a) :] for a, b in parts]
            changing.setdefault(other, []).append(_share(found, columns.get(other, 0)))
        weights = {code: ORIGINAL_WEIGHT if original[code] else 1.0 for code in held_out}
        wrong = {code: 1 - fmean([share, *changing.get(code, [])]) for code, share in whole.items()}
        errors[memory] = sum(weights[c] * wrong[c] for c in wrong) / sum(weights.values())
        recognised[memory] = whole
    return errors, recognised


def _share(found: list[Tensor], wanted: int) -> float:
    return (torch.cat(found) == wanted).double().mean().item()


def recognised_languages(model: PeftModel, input_ids: Tensor) -> list[list[str | None]]:
    """The language that routing by context takes each token for; None for an original or unknown one.

    Args:
        model: an adapter with an identifier.
        input_ids: (B, S); -1 for padding.

    Raises:
        LanguageError: the active adapter has none: call `fit_identifier` first.
    """
    tuner = model.base_model
    assert isinstance(tuner, MoeDeltaTuner)
    identifier = Identifiers.required(tuner.model)
    names: list[str | None] = [None, *columns_of(tuner.active_config)]
    fitted = fitted_of(tuner.active_config)
    found = recognise(input_ids, identifier.scores(input_ids.device), fitted.memory, fitted.threshold)
    return [[names[i] for i in row] for row in found.tolist()]
