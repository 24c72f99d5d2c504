"""What `generate` needs to know of languages and new tokens.

In: an upcycled causal LM and the arguments of a call to `generate`. Out: each pass's own `language_ids`. transformers
hands a model's arguments to every pass as they were given for the prompt (and to the assistant of assisted generation,
which may know none of them), whereas a pass may be a part of the prompt, one token, or several proposed at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LanguageError
from ..routing import ContextRouting
from .identifier import AUTO

ARGUMENTS = ("language", "language_ids")
"""Keyword arguments that an upcycled model accepts beyond the base model's own."""

_GENERATE, _PREPARE, _BATCH = "generate", "prepare_inputs_for_generation", "generate_batch"
_TURNS = Lock()  # of continuous batching, during which the default language is its own


class LanguageInputs:
    """The base model's own `prepare_inputs_for_generation`, which gives each pass the languages of its tokens.

    Attributes:
        kept: thread -> languages that `generate` was given there and keeps from its assistant.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wrapped = model.__dict__.get(_PREPARE)
        self.kept: dict[int, dict[str, Any]] = {}

    @property
    def __signature__(self) -> inspect.Signature:  # asked for, not kept: a model that holds one cannot be pickled
        return inspect.signature(_own(self.model, _PREPARE, self.wrapped))

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs |= self.kept.get(get_ident(), {})
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
        if not _takes_languages(assistant, self.model):
            self.inputs.kept[get_ident()] = {
                name: kwargs.pop(name) for name in ARGUMENTS if kwargs.get(name) is not None
            }
        try:
            with _vocabulary_in_force(self.model), _vocabulary_in_force(assistant):
                return _own(self.model, _GENERATE, self.wrapped)(*args, **kwargs)
        finally:
            self.inputs.kept.pop(get_ident(), None)


class LanguageBatches:
    """The base model's own `generate_batch` (continuous batching), with one language for all prompts or one for each.

    Its passes pack tokens of several prompts, and are made in a thread where arguments of the call do not arrive. So
    prompts of one language run together, with the default language set to theirs.

    Args:
        model: the base model.
        context: its `ForwardContext`, which has the default language.
    """

    def __init__(self, model: nn.Module, context: Any) -> None:
        self.model, self.context = model, context
        self.wrapped = model.__dict__.get(_BATCH)

    def __call__(
        self, inputs: Sequence[Any], *args: Any, language: str | Sequence[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """
        Raises:
            LanguageError: a language is unknown, missing, or would have to be read from the text.
        """
        named = [language] * len(inputs) if language is None or isinstance(language, str) else list(language)
        if len(named) != len(inputs):
            raise LanguageError(f"`language` has {len(named)} codes for {len(inputs)} prompts. Give one for each.")
        codes = [self.context.language if code is None else code for code in named]
        self._check(set(codes), kwargs)
        with _TURNS, _vocabulary_in_force(self.model):
            parts = {code: [place for place, other in enumerate(codes) if other == code] for code in codes}
            found = [(self._of_language(code, inputs, places, args, kwargs), places) for code, places in parts.items()]
        return found[0][0] if len(found) == 1 else _in_order(found)

    def _of_language(
        self, code: str | None, inputs: Sequence[Any], places: Sequence[int], args: Any, kwargs: Any
    ) -> dict[str, Any]:
        before, self.context.language = self.context.language, code
        try:
            own = _own(self.model, _BATCH, self.wrapped)
            answers: dict[str, Any] = own([inputs[place] for place in places], *args, **kwargs)
            return answers
        finally:
            self.context.language = before

    def _check(self, codes: set[str | None], kwargs: dict[str, Any]) -> None:
        """What would fail in the other thread, or be ignored there."""
        if kwargs.get("language_ids") is not None:
            raise LanguageError(
                '`generate_batch` takes codes, language="hu" or one for each prompt, and no `language_ids`.'
            )
        if len(codes) > 1 and kwargs.get("persistent_manager"):
            raise LanguageError("A manager that stays (persistent_manager=True) serves one language; got several.")
        config = _config_in_force(self.model)
        if config is None:
            return
        table, reads = config.language_table, isinstance(config.routing_rule, ContextRouting)
        for code in codes:
            if code == AUTO or (code is None and reads):
                raise LanguageError(
                    "Continuous batching keeps no text from pass to pass, so no language can be read from it. Name it, "
                    'language="hu" or one for each prompt, or call `generate`.'
                )
            if code not in (None, self.context.language):  # a default that an adapter does not know is no mistake
                table.id_of(code)
            elif code not in table.codes and config.must_be_told:
                raise LanguageError(
                    f"Name the language of the prompts, language=..., as one of {', '.join(table.codes)}."
                )


def attach(model: nn.Module, context: Any) -> None:
    """Put all of them over a model that generates; `context` is its `ForwardContext`."""
    if hasattr(type(model), _GENERATE) and hasattr(type(model), _PREPARE):
        inputs = LanguageInputs(model)
        model.__dict__[_GENERATE] = LanguageGenerate(model, inputs)
        model.__dict__[_PREPARE] = inputs
    if hasattr(type(model), _BATCH):
        model.__dict__[_BATCH] = LanguageBatches(model, context)


def detach(model: nn.Module) -> None:
    """Take them off again."""
    for name in (_GENERATE, _PREPARE, _BATCH):
        ours = model.__dict__.get(name)
        if isinstance(ours, LanguageInputs | LanguageGenerate | LanguageBatches):
            del model.__dict__[name]
            if ours.wrapped is not None:
                model.__dict__[name] = ours.wrapped


def _own(model: nn.Module, name: str, wrapped: Callable[..., Any] | None) -> Callable[..., Any]:
    return getattr(type(model), name).__get__(model) if wrapped is None else wrapped


def _config_in_force(model: nn.Module) -> Any:
    """The configuration of the active adapter; None where none is in force."""
    for module in model.modules():
        settings, name = getattr(module, "settings", None), getattr(module, "in_force", None)
        if isinstance(settings, dict) and name in settings:
            return getattr(
                settings[name], "config", settings[name]
            )  # what holds new tokens has the configuration itself
    return None


def _in_order(found: Sequence[tuple[dict[str, Any], Sequence[int]]]) -> dict[str, Any]:
    """The answers to all prompts in their order, each under the name that it would have in one call."""
    placed = []
    for answers, places in found:
        for name, answer in answers.items():
            number, child, rest = name.removeprefix("req_").partition("__child#")
            answer.request_id = f"req_{places[int(number)]}{child}{rest}"
            placed.append((places[int(number)], answer))
    return {answer.request_id: answer for _, answer in sorted(placed, key=lambda pair: pair[0])}


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


def _takes_languages(assistant: Any, model: nn.Module) -> bool:
    """Whether an assistant is upcycled itself, for the same languages; True where there is none."""
    if assistant is None:
        return True
    own = assistant.get_base_model() if hasattr(assistant, "get_base_model") else assistant
    return set(ARGUMENTS) <= set(inspect.signature(own.forward).parameters) and _codes(own) == _codes(model)


def _codes(model: Any) -> tuple[str, ...]:
    """The languages that a model may be told, by id: of its adapter, or of an export with its own modelling file."""
    config = _config_in_force(model)
    if config is not None:
        return tuple(config.language_table.codes)
    return tuple((getattr(model.config, "moe_delta", None) or {}).get("languages") or ())


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
