"""A model that answers requests in whatever language each of them names: an adapter, a grafted adapter or an export.

In: a request's `language`, which is a code, "auto" or nothing. Out: what a call to the model has to be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import LanguageError
from ..evaluation.forward import most_tokens
from ..evaluation.generation import ends_of
from ..evaluation.loading import Measured, settings_of
from ..languages import closest_code
from ..tuner.identifier import AUTO


class Hosted:
    """A model with its tokenizer, and what it has to be told of languages.

    Attributes:
        codes: the languages that a request may name; none for a stock export, which needs none.
        must_be_told: whether a request has to name one, or "auto".
        reads: whether it can read the language from the text.
        ends: tokens that end an answer.
        positions: how many tokens it reads at most; None where nothing limits them.
    """

    def __init__(self, measured: Measured) -> None:
        self.model: Any = measured.model
        self.tokenizer = measured.tokenizer
        settings = settings_of(self.model)
        self.is_adapter = settings is not None
        if settings is not None:
            codes, told = settings.config.language_table.codes, settings.config.must_be_told
            self.reads = settings.config.record.identifier is not None
        else:
            codes = (getattr(self.model.config, "moe_delta", None) or {}).get("languages") or ()  # of remote code
            told, self.reads = bool(codes), False
        self.codes, self.must_be_told = tuple(codes), bool(told)
        self.ends = ends_of(self.model, self.tokenizer)
        self.positions = most_tokens(self.model)

    def resolved(self, language: str | None) -> str | None:
        """A request's language as the model writes it, "auto" for one to be read, None for one that nobody needs.

        Raises:
            LanguageError: the model does not know the language, or has to be told one.
        """
        if language == AUTO and self.reads:
            return AUTO
        if language in (None, AUTO):
            if self.must_be_told:
                reads = ' or "auto"' if self.reads else ""
                raise LanguageError(
                    f"This model chooses experts by language: got language={language!r}, expected one of "
                    f"{', '.join(self.codes)}{reads}."
                )
            return None
        assert language is not None
        if not self.codes:
            raise LanguageError(f"This model answers every language alike: leave out language={language!r}.")
        code = closest_code(language, self.codes)
        if code is None:
            raise LanguageError(f"Unknown language {language!r}; this model knows {', '.join(self.codes)}.")
        return code

    def arguments(self, languages: Sequence[str | None]) -> dict[str, Any]:
        """What a call is told of the languages of its rows, which are all named, all "auto", or all None."""
        if languages[0] is None:
            return {}
        if languages[0] == AUTO:
            return {"language": AUTO}
        if self.is_adapter:
            return {"language": list(languages)}
        ids = [self.codes.index(str(language)) for language in languages]
        return {"language_ids": torch.tensor(ids, device=self.model.device)}
