"""Texts as the rows of a forward pass, for fitting the rows of new tokens."""

from __future__ import annotations

from transformers import PreTrainedModel

LENGTH = 128


def longest(model: PreTrainedModel) -> int:
    """Tokens in a row, its beginning included."""
    return min(LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)


def options_for(language: str | None) -> dict[str, str]:
    """What the model is called with so that it reads a text as this language."""
    return {} if language is None else {"language": language}
