"""`load`: a model that this package made, by its folder or Hub id, with its tokenizer.

In: an adapter, a grafted adapter, or an export. Out: what PEFT or transformers load from it. Unlike
`AutoPeftModelForCausalLM` it needs no base that lies where it lay, leaves the base's embeddings alone where the adapter
brings new tokens, and takes exports as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CheckpointError
from .evaluation.loading import with_learnt_tokens, with_tokenizer
from .loading import is_adapter, load_adapter, load_adapter_config, load_causal_lm, load_tokenizer


def load(
    name: str | Path, *, base: str | Path | None = None, is_trainable: bool = False, **options: Any
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its tokenizer, in evaluation mode unless it is to be trained further.

    Args:
        name: folder or Hub id of an adapter, a grafted adapter, or an export.
        base: the model that an adapter lies over, where it is no longer where the adapter says.
        is_trainable: whether the adapter's experts and routers are to train; an export trains as any model does.
        options: as `AutoModelForCausalLM.from_pretrained` takes them, such as `dtype` and `device_map`; for an
            adapter they go to its base. An export with a modelling file of its own needs `trust_remote_code=True`.

    Returns:
        The model, and a tokenizer that knows the adapter's new tokens.

    Raises:
        CheckpointError: nothing can be loaded from `name`, or the adapter's base is not there.
        DataError: the tokenizer is not the model's.
    """
    options = {"trust_remote_code": False, **options}  # said outright, or transformers asks at the terminal
    if not is_adapter(name):
        return load_causal_lm(name, **options), load_tokenizer(name)
    base = base or load_adapter_config(name).base_model_name_or_path
    if base is None:
        raise CheckpointError(f"The adapter {str(name)!r} names no base model. Give it as `base`.")
    model = load_adapter(_base_of(name, base, options), name, is_trainable=is_trainable)
    has_own = with_tokenizer(str(name)) == str(name)
    return model, with_learnt_tokens(load_tokenizer(name if has_own else base), model)


def _base_of(name: str | Path, base: str | Path, options: dict[str, Any]) -> PreTrainedModel:
    try:
        return load_causal_lm(base, **options)
    except CheckpointError as error:
        raise CheckpointError(
            f"The adapter {str(name)!r} lies over {str(base)!r}, which does not load. {error} If the base is somewhere "
            "else, give it as `base`."
        ) from error
