"""New tokens for an upcycled model and its tokenizer at once.

In: the PEFT model (or what was grafted from it) and a tokenizer without the new tokens. Out: both with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..documents import check_documents
from ..errors import DataError, PlanError
from ..tuner import MoeDeltaTuner
from ..tuner.vocabulary import check_can_grow, grow, start_from_pieces
from .distil import distil_rows
from .fit import check_can_fit, fit_rows
from .growth import TokenizerGrowth


def extend_vocabulary(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] | None = None,
    *,
    texts: Sequence[str] = (),
    language: str | None = None,
) -> PreTrainedTokenizerBase:
    """Teach a model and its tokenizer new tokens; their embeddings train in expansion, and they alone.

    Call it between `get_peft_model` and training. An input row, and an output row where the two are not tied, starts as
    the mean of the rows of the known tokens that spell the new one. With `texts`, input rows are then distilled, so
    that the model reads a new token as it reads its pieces (see `distil`), and output rows fitted to predict the new
    tokens (see `fit`); nothing else moves. The rows are saved with the adapter and frozen in review.

    Later, `extend_vocabulary(model, tokenizer)` without tokens gives those of a loaded adapter to the base model's
    tokenizer, or those of a grafted adapter or stock model to the post-trained model's, to be saved beside it.

    Args:
        model: made by `get_peft_model(base, MoeDeltaConfig(...))`; or loaded or grafted, without `new_tokens`.
        tokenizer: a fast tokenizer of the model it was made from; changed in place.
        new_tokens: strings as `propose_tokens` returns them (the tokenizer's spelling), or words as text, which are
            matched literally. None for those the model has.
        texts: some documents of the new languages to fit the rows to; of use with `new_tokens`. The benchmark
            takes 60 kB; the hidden states of all of it are held in memory.
        language: what the model reads `texts` as, where its routing needs to know.

    Returns:
        The tokenizer.

    Raises:
        DataError: no model of ours, a token cannot be taken, another tokenizer than the model's, or empty `texts`.
        PlanError, ArchitectureError, LanguageError: see `MoeDeltaModel.add_tokens` and `fit.check_can_fit`.
    """
    if new_tokens is None:
        _give_known_tokens(model, tokenizer)
        return tokenizer
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MoeDeltaTuner):
        raise DataError(
            f"new_tokens are learnt by an upcycled model; got a {type(model).__name__}. Call get_peft_model first."
        )
    growth = TokenizerGrowth.plan(tokenizer, new_tokens)
    if texts:
        texts = check_documents(texts)
        check_can_fit(tuner.model, tokenizer, language)
    add_tokens(tuner, list(growth.tokens), growth.first_id, [list(ids) for ids in growth.pieces])
    growth.apply(tokenizer)
    if texts:
        distil_rows(tuner, tokenizer, texts, language, growth.pieces)
        fit_rows(tuner, tokenizer, texts, language)
    return tokenizer


def add_tokens(tuner: MoeDeltaTuner, tokens: list[str], first_id: int, pieces: list[list[int]]) -> None:
    """Grow the active adapter's vocabulary; see `MoeDeltaModel.add_tokens`."""
    name, config = tuner.active_adapters[0], tuner.active_config
    if config.record.new_tokens:
        raise PlanError(
            f"Adapter {name!r} has {len(config.record.new_tokens)} new tokens already. Choose all of them before "
            "training."
        )
    record = replace(
        config.record, new_tokens=tuple(tokens), first_new_token_id=first_id, new_tokens_step=config.newest_step
    )
    check_can_grow(tuner.model, replace(config, record=record))
    config.change(record=record)
    grow(tuner.model, name, config)
    experts = next(iter(tuner.layers(name).values())).moe_delta_experts[name]
    start_from_pieces(tuner.model, name, pieces, next(experts.parameters()).dtype)
    tuner.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)


def _give_known_tokens(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tuner = getattr(model, "base_model", None)
    owner = tuner.active_config.record if isinstance(tuner, MoeDeltaTuner) else getattr(model, "graft_report", None)
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
