"""A model to be measured, from whatever a user has: a folder, a Hub id, an adapter, or a model in memory.

In: one of these. Out: the model, its tokenizer, and which language to name when it is called.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ..languages import ORIGINAL_GROUP, closest_code
from ..loading import load_causal_lm, load_tokenizer
from ..tuner import MoeDeltaLayer
from ..vocabulary import give_tokens

ADAPTER_CONFIG, TOKENIZER_CONFIG = "adapter_config.json", "tokenizer_config.json"

Source = str | Path | tuple[Any, PreTrainedTokenizerBase]
"""A folder or Hub id of a model or adapter; or a model in memory with its tokenizer."""


@dataclass(frozen=True)
class Measured:
    """A model that is ready to be measured.

    Attributes:
        model: in whatever form; its weights are not changed.
        tokenizer: its own.
        source: where it came from, None for one in memory.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: str | None

    @property
    def groups(self) -> dict[str, str]:
        """Language -> group of an adapter of this package; empty for other models."""
        table = self._table()
        return {} if table is None else {c: table.groups[g] for c, g in zip(table.codes, table.group_of, strict=True)}

    def spoken(self, language: str) -> str | None:
        """The language to name in a call, as the adapter writes it, where it must be told one; an original one
        (expert 0) where the adapter does not know the language; None where the routing needs none, or reads it."""
        table = self._table()
        if table is None or not settings_of(self.model).config.must_be_told:
            return None
        return closest_code(language, table.codes) or next(iter(table.members(ORIGINAL_GROUP)), table.codes[0])

    def _table(self) -> Any:
        settings = settings_of(self.model)
        return None if settings is None else settings.tables.languages


def load(source: Source, **options: Any) -> Measured:
    """A model with its tokenizer, in the dtype it is stored in; on the first GPU where there is one.

    `options` as `from_pretrained` takes them, such as `trust_remote_code`.

    Raises:
        CheckpointError: no such folder or repository, or no tokenizer with it.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        return Measured(model, with_learnt_tokens(tokenizer, model), source=None)
    model = load_causal_lm(source, dtype="auto", **options)
    tokenizer = load_tokenizer(with_tokenizer(str(source)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)  # type: ignore[arg-type]  # `to` loses its self
    return Measured(model, with_learnt_tokens(tokenizer, model), str(source))


def with_learnt_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with the tokens that the model has learnt: an adapter may be saved without its own tokenizer, and
    the base model's would never use them.

    Raises:
        DataError: another tokenizer than the model's.
    """
    settings = settings_of(model)
    owner = getattr(model, "graft_report", None) if settings is None else settings.config.record
    if owner is None or not owner.new_tokens:
        return tokenizer
    grown = copy.deepcopy(tokenizer)  # the caller's own stays as it is
    give_tokens(grown, owner.new_tokens, owner.first_new_token_id)
    return grown


def with_tokenizer(source: str) -> str:
    """The folder or id itself, or the base model of an adapter that was saved without a tokenizer."""
    if cached_file(source, TOKENIZER_CONFIG, _raise_exceptions_for_missing_entries=False) is not None:
        return source
    config = cached_file(source, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False)
    if config is None:
        return source
    base: str = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def settings_of(model: Any) -> Any:
    """The settings of the active adapter's first layer; None for other models."""
    for module in model.modules():
        if isinstance(module, MoeDeltaLayer) and module.in_force is not None:
            return module.settings[module.in_force]
    return None
