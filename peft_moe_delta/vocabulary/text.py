"""Texts as the rows of a forward pass, for fitting the rows of new tokens."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError

LENGTH = 128


def longest(model: PreTrainedModel) -> int:
    """Tokens in a row, its beginning included."""
    return min(LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins with.

    Raises:
        DataError: there is none.
    """
    beginning = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if beginning is None:
        raise DataError(
            "The tokenizer has neither a bos nor an eos token; expected one of them to begin a text with. Set "
            "tokenizer.bos_token."
        )
    return int(beginning)


def options_for(language: str | None) -> dict[str, str]:
    """What the model is called with so that it reads a text as this language."""
    return {} if language is None else {"language": language}
