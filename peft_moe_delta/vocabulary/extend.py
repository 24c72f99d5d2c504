"""New tokens for an upcycled model and its tokenizer at once.

In: the PEFT model (or what was grafted from it) and a tokenizer without the new tokens. Out: both with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..tuner import MoeDeltaModel
from .growth import TokenizerGrowth


def extend_vocabulary(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str] | None = None
) -> PreTrainedTokenizerBase:
    """Teach a model and its tokenizer new tokens; their embeddings train in expansion, and they alone.

    Call it between `get_peft_model` and training. An input row, and an output row where the two are not tied, starts as
    the mean of the rows of the known tokens that spell the new one. They are saved with the adapter and frozen in
    review.

    Later, `extend_vocabulary(model, tokenizer)` without tokens gives those of a loaded adapter to the base model's
    tokenizer, or those of a grafted adapter or stock model to the post-trained model's, to be saved beside it.

    Args:
        model: made by `get_peft_model(base, MoeDeltaConfig(...))`; or loaded or grafted, without `new_tokens`.
        tokenizer: a fast tokenizer of the model it was made from; changed in place.
        new_tokens: strings as `propose_tokens` returns them (the tokenizer's spelling), or words as text, which are
            matched literally. None for those the model has.

    Returns:
        The tokenizer.

    Raises:
        DataError: no model of ours, a token cannot be taken, or another tokenizer than the model's.
        PlanError, ArchitectureError: see `MoeDeltaModel.add_tokens`.
    """
    if new_tokens is None:
        _give_known_tokens(model, tokenizer)
        return tokenizer
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MoeDeltaModel):
        raise DataError(
            f"new_tokens are learnt by an upcycled model; got a {type(model).__name__}. Call get_peft_model first."
        )
    growth = TokenizerGrowth.plan(tokenizer, new_tokens)
    tuner.add_tokens(list(growth.tokens), growth.first_id, [list(ids) for ids in growth.pieces])
    growth.apply(tokenizer)
    return tokenizer


def _give_known_tokens(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tuner = getattr(model, "base_model", None)
    owner = tuner.active_config if isinstance(tuner, MoeDeltaModel) else getattr(model, "graft_report", None)
    tokens, first = (getattr(owner, name, None) for name in ("new_tokens", "first_new_token_id"))
    if tokens and first is not None:
        give_tokens(tokenizer, tokens, first)


def give_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], first: int) -> None:
    """Give a tokenizer the tokens that a model has learnt already, in place; one that knows them is left as it is.

    Args:
        tokenizer: a fast tokenizer of the model's own base.
        tokens: in the order of their ids.
        first: id of the first.

    Raises:
        DataError: a token cannot be taken, or another tokenizer than the model's.
    """
    vocabulary = tokenizer.get_vocab()
    if all(vocabulary.get(token) == first + index for index, token in enumerate(tokens)):
        return
    growth = TokenizerGrowth.plan(tokenizer, tokens)
    if growth.first_id != first:
        raise DataError(
            f"The model's new tokens start at id {first}, this tokenizer would start them at {growth.first_id}. Pass "
            "the tokenizer of the model's own base: the post-trained model's after a graft."
        )
    growth.apply(tokenizer)
