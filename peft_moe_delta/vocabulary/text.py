"""Texts as the rows of a forward pass, for fitting the rows of new tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
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


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, longest row), padded on the right."""
    mask = (torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask
