"""Rows of token ids: how a text begins, and how rows become one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import DataError


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 (B, longest row), padded on the right.

    The padding's id is 0: any would do, as it is masked and never scored.
    """
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids, mask


def beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that every text begins with wherever a model is measured or fitted: bos, or eos without one.

    It is the context of the text's first own token, and no token of the text itself.

    Raises:
        DataError: the tokenizer has neither.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise DataError(
            "tokenizer: got neither a bos nor an eos token, expected one of them to begin every text with. "
            "Set tokenizer.bos_token."
        )
    return int(token)


def beginning_of_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a prompt begins with: bos, or nothing without one, as its first token is not to be predicted."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
