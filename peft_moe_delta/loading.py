"""Models, tokenizers and configs by the name a user gives: loaded, or refused with one clear error.

In: a folder or Hub id. Out: what transformers loads from it. What a damaged file makes transformers raise is whatever
its parsers stumble over (KeyError, TypeError, a bare `Exception` from tokenizers), so everything is caught here, and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .errors import CheckpointError, DataError, PeftMoeDeltaError

Loaded = TypeVar("Loaded")


def load_config(name: str | Path, **options: Any) -> PretrainedConfig:
    """The config of a model.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return _loaded("config of a model", name, lambda: AutoConfig.from_pretrained(name, **options))


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    # Said outright: beside a modelling file of its own, transformers would ask at the terminal, and wait.
    return _loaded("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False))


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a base model.

    Raises:
        DataError: there is none.
    """
    try:
        return load_tokenizer(model.name_or_path)
    except CheckpointError as error:
        raise DataError(f"No tokenizer beside the base model {model.name_or_path!r}: {error} Pass one.") from error


def load_causal_lm(name: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model; `options` as `from_pretrained` takes them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return _loaded("causal language model", name, lambda: AutoModelForCausalLM.from_pretrained(name, **options))


def is_adapter(name: str | Path) -> bool:
    """Whether a folder or repository holds an adapter, of whatever method.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return _loaded("model or adapter", name, lambda: find_adapter_config_file(str(name))) is not None


def load_adapter(model: PreTrainedModel, name: str | Path, **options: Any) -> PeftModel:
    """A model with an adapter; `options` as `PeftModel.from_pretrained` takes them.

    Raises:
        CheckpointError: there is none, or it is damaged.
        PeftMoeDeltaError: it is another model's.
    """
    return _loaded("adapter", name, lambda: PeftModel.from_pretrained(model, name, **options))


def load_adapter_config(name: str | Path) -> PeftConfig:
    """The config of an adapter, of whatever method.

    Raises:
        CheckpointError: there is none, or it is damaged.
        PeftMoeDeltaError: it is this package's, and says what cannot be.
    """
    return _loaded("config of an adapter", name, lambda: PeftConfig.from_pretrained(str(name)))


def _loaded(what: str, name: str | Path, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except PeftMoeDeltaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"Cannot load a {what} from {str(name)!r}: {reason} Give a folder that save_pretrained wrote, or a Hub id, "
            "and check that its files are whole."
        ) from error
