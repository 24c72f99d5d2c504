"""What `generate` needs to know of languages and new tokens.

In: an upcycled causal LM and the arguments of a call to `generate`. Out: each pass's own `language_ids`. transformers
hands a model's arguments to every pass as they were given for the prompt (and to the assistant of assisted generation,
which may know none of them), whereas a pass may be a part of the prompt, one token, or several proposed at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LanguageError

ARGUMENTS = ("language", "language_ids")
"""Keyword arguments that an upcycled model accepts beyond the base model's own."""

_GENERATE, _PREPARE = "generate", "prepare_inputs_for_generation"


class LanguageInputs:
    """The base model's own `prepare_inputs_for_generation`, which gives each pass the languages of its tokens.

    Attributes:
        prompt: languages that `generate` was given and keeps from its assistant.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wrapped = model.__dict__.get(_PREPARE)
        self.prompt: dict[str, Any] = {}

    @property
    def __signature__(self) -> inspect.Signature:  # asked for, not kept: a model that holds one cannot be pickled
        return inspect.signature(_own(self.model, _PREPARE, self.wrapped))

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs |= self.prompt
        inputs = _own(self.model, _PREPARE, self.wrapped)(input_ids, *args, **kwargs)
        ids = kwargs.get("language_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            inputs["language_ids"] = _ids_of_pass(ids, input_ids, inputs, kwargs)
        return inputs


class LanguageGenerate:
    """The base model's own `generate`, with assistants that know no languages, and with an adapter's new tokens."""

    def __init__(self, model: nn.Module, inputs: LanguageInputs) -> None:
        self.model = model
        self.wrapped = model.__dict__.get(_GENERATE)
        self.inputs = inputs

    @property
    def __signature__(self) -> inspect.Signature:  # asked for, not kept: a model that holds one cannot be pickled
        return inspect.signature(_own(self.model, _GENERATE, self.wrapped))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        if not _takes_languages(assistant):
            self.inputs.prompt = {name: kwargs.pop(name) for name in ARGUMENTS if kwargs.get(name) is not None}
        try:
            with _vocabulary_in_force(self.model), _vocabulary_in_force(assistant):
                return _own(self.model, _GENERATE, self.wrapped)(*args, **kwargs)
        finally:
            self.inputs.prompt = {}


def attach(model: nn.Module) -> None:
    """Put both over a model that generates."""
    if hasattr(type(model), _GENERATE) and hasattr(type(model), _PREPARE):
        inputs = LanguageInputs(model)
        model.__dict__[_GENERATE] = LanguageGenerate(model, inputs)
        model.__dict__[_PREPARE] = inputs


def detach(model: nn.Module) -> None:
    """Take them off again."""
    for name in (_GENERATE, _PREPARE):
        ours = model.__dict__.get(name)
        if isinstance(ours, LanguageInputs | LanguageGenerate):
            del model.__dict__[name]
            if ours.wrapped is not None:
                model.__dict__[name] = ours.wrapped


def _own(model: nn.Module, name: str, wrapped: Callable[..., Any] | None) -> Callable[..., Any]:
    return getattr(type(model), name).__get__(model) if wrapped is None else wrapped


@contextmanager
def _vocabulary_in_force(model: Any) -> Iterator[None]:
    """Let the config count new tokens: transformers sizes what it makes, such as prompt lookup's scores, by it."""
    embedding = None if model is None else model.get_input_embeddings()
    if embedding is None or not hasattr(embedding, "num_embeddings"):
        yield
        return
    config = model.config.get_text_config()
    before, config.vocab_size = config.vocab_size, max(config.vocab_size, embedding.num_embeddings)
    try:
        yield
    finally:
        config.vocab_size = before


def _takes_languages(assistant: Any) -> bool:
    """Whether an assistant is upcycled itself; True where there is none."""
    if assistant is None:
        return True
    model = assistant.get_base_model() if hasattr(assistant, "get_base_model") else assistant
    return set(ARGUMENTS) <= set(inspect.signature(model.forward).parameters)


def _ids_of_pass(ids: Tensor, input_ids: Tensor, inputs: dict[str, Any], kwargs: dict[str, Any]) -> Tensor:
    """The language ids of a pass's tokens: the prompt's own, and its last one for whatever comes after.

    Args:
        ids: (B, P), of the prompt.
        input_ids: (B, W) all tokens so far, proposed ones included, or one chunk of a long prompt.
        inputs: what the pass is going to be called with.
        kwargs: what `generate` knows.

    Raises:
        LanguageError: the prompt's ids do not cover the prompt.
    """
    embeddings, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    end = input_ids.shape[1] + (0 if embeddings is None else embeddings.shape[1])
    tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    length, given = tokens.shape[1], ids.shape[1]
    chunk = given > end
    if chunk:
        cache = kwargs.get("past_key_values")
        end = mask.shape[1] if isinstance(mask, Tensor) else length + (0 if cache is None else cache.get_seq_length())
    if given < end and (chunk or (kwargs.get("is_first_iteration") and length < end)):
        raise LanguageError(
            f"`language_ids` has {given} ids a row where the prompt has {end} tokens, the cached ones included. Give "
            "one id for each token so far, or one id a row."
        )
    if given < end:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, end - given)], dim=1)
    return ids[:, end - length : end]
