"""Growing an adapter from a file: an adapter and new languages in; the grown adapter out, trained where the file says.

Languages that the adapter knows already give the text of the review.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from ..checkpoint import whole_folder
from ..errors import RecipeError
from ..evaluation import closest_group
from ..identifier import fit_identifier
from ..languages import LanguageTable
from ..loading import load_adapter, load_adapter_config, load_tokenizer
from ..mixing import EARLIER_WEIGHT, fit_routers
from ..model import MoeDeltaModel
from ..sources import Documents, read_texts
from .data import shuffled
from .fields import Training
from .growth import CLOSEST, Growth
from .stages import Features, blocks, load_model, save_adapter, settled_precision, train
from .unfinished import Checkpoints

_SCORED_BYTES = 20_000
_FITTED_BYTES = 50_000


def grow(growth: Growth) -> Path:
    """Add the languages, train as asked, save the adapter. Returns its folder.

    Raises:
        RecipeError: the adapter names no base model, or a review lacks text of a group.
        LanguageError, PlanError: as `MoeDeltaModel.add_languages`.
    """
    growth = replace(growth, precision=settled_precision(growth.precision))
    with whole_folder(growth.output) as folder:
        base = base_of(growth, load_adapter_config(growth.adapter))
        model = load_adapter(load_model(base), growth.adapter, is_trainable=True)
        tuner, tokenizer = cast("MoeDeltaModel", model.base_model), load_tokenizer(base)
        known = set(tuner.active_config.languages)
        new = {code: language.group for code, language in growth.languages.items() if code not in known}
        tuner.add_languages(new, growth.experts, _start_from(growth, model, tokenizer, new))
        review = growth.review
        reviewed: Features = []
        if review is not None:  # what the review lacks is to be found out before the expansion, not after it
            now = tuner.active_config
            replace(
                now,
                record=replace(now.record, stage="review"),
                routing=review.routing or now.routing,
                language_prior_groups=review.language_prior_groups,
            )
            reviewed = _balanced(growth, tuner, tokenizer, review)
        if growth.expand is not None:
            tuner.start_expansion(routing=growth.expand.routing)
            _train(growth, model, blocks(growth, tokenizer, list(new), growth.expand), growth.expand, tokenizer, folder)
        if review is not None:
            tuner.start_review(
                routing=review.routing,
                language_prior_coef=review.language_prior_coef,
                language_prior_groups=review.language_prior_groups,
            )
            if growth.experts:
                fit_routers(model, _fitted(growth), tokenizer, only="newest", max_length=review.sequence_length)
            _train(growth, model, reviewed, review, tokenizer, folder)
        if tuner.active_config.record.identifier is not None:
            fit_identifier(model, {code: Documents(growth.languages[code].train, code) for code in new}, tokenizer)
        save_adapter(model, folder)
    return Path(growth.output)


def _train(
    growth: Growth,
    model: PeftModel,
    features: Features,
    fields: Training,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Train in one piece: Ctrl-C ends it, and nothing is kept."""
    with TemporaryDirectory() as scratch:
        train(growth, model, features, fields, tokenizer, folder, Checkpoints(Path(scratch, "grown"), {}))


def base_of(growth: Growth, adapter: PeftConfig) -> str:
    """The base model of the adapter that grows.

    Raises:
        RecipeError: it names none.
    """
    base = growth.model or adapter.base_model_name_or_path
    if base is None:
        raise RecipeError(f"The adapter {growth.adapter} names no base model. Give it as `model`.")
    return base


def _start_from(
    growth: Growth, model: PeftModel, tokenizer: PreTrainedTokenizerBase, new: Mapping[str, str]
) -> str | dict[str, str] | None:
    """`start_from`, the closest groups looked up on the new groups' text."""
    if growth.start_from != CLOSEST:
        return growth.start_from
    texts: dict[str, list[str]] = {}
    for code, group in new.items():
        if group in growth.experts:
            texts.setdefault(group, []).extend(read_texts(growth.languages[code].train, _SCORED_BYTES, language=code))
    return {group: closest_group(model, tokenizer, documents) for group, documents in texts.items()}


def _fitted(growth: Growth) -> dict[str, list[str]]:
    """Some documents of every language, from anywhere in its file."""
    picked: dict[str, list[str]] = {}
    for code, language in growth.languages.items():
        texts, size = shuffled(language.train, code, growth.seed), 0
        picked[code] = []
        while size < _FITTED_BYTES and (text := next(texts, None)) is not None:
            picked[code].append(text)
            size += len(text.encode())
    return picked


def _balanced(growth: Growth, tuner: MoeDeltaModel, tokenizer: PreTrainedTokenizerBase, fields: Training) -> Features:
    """`EARLIER_WEIGHT` times as many blocks of every earlier group as of a new one.

    Within a group, equally many of each of its languages that the file gives.

    Raises:
        RecipeError: a group without text.
    """
    features = []
    for codes, share in review_shares(growth, tuner.active_config.language_table, fields):
        features += blocks(growth, tokenizer, codes, share)
    random.Random(growth.seed).shuffle(features)
    return features


def review_shares(growth: Growth, table: LanguageTable, fields: Training) -> list[tuple[list[str], Training]]:
    """Of each group of a grown adapter: its languages that the file gives, and its share of the review.

    Raises:
        RecipeError: a group without text.
    """
    members = {group: [c for c in table.members(group) if c in growth.languages] for group in table.groups}
    without = [group for group, codes in members.items() if not codes and table.members(group)]
    if without:
        raise RecipeError(
            f"A review needs text of every group, and `languages` has none of {', '.join(without)}. Add one of its "
            f"languages with its file: {', '.join(code for group in without for code in table.members(group))}."
        )
    weights = {group: 1.0 if group in growth.experts else EARLIER_WEIGHT for group, codes in members.items() if codes}
    return [
        (members[group], replace(fields, steps=math.ceil(fields.steps * weight / sum(weights.values()))))
        for group, weight in weights.items()
    ]
