"""One evaluation forward pass: rows of token ids come in, logits at chosen positions go out.

Shapes: B rows, T longest row, P chosen positions, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..export.gate import evaluating as in_evaluation_mode
from ..padding import padded

# Wraps the list of batches and yields them in order, as `tqdm.tqdm` does.
Progress = Callable[[list[Any]], Iterable[Any]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own training flag back."""
    with in_evaluation_mode(model), torch.inference_mode():
        yield


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, so that little padding is computed; longest first, so that a batch too big
    for the memory fails at once."""
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}, expected 1 or more. Pass how many rows to run at once.")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def logits_at(
    model: nn.Module, rows: Sequence[Sequence[int]], positions: Iterable[int], language: str | None
) -> torch.Tensor:
    """(B, P, V) logits at `positions`, in their order, of right-padded `rows`, in the model's own dtype.

    `language` reaches the model only when given: adapters understand it, plain models do not.
    """
    forward = _inner_forward(model)
    device = next(model.parameters()).device
    check_positions(model, max(len(row) for row in rows))
    input_ids, attention_mask = padded(rows)
    wanted = torch.tensor(list(positions), device=device)
    options: dict[str, Any] = {} if language is None else {"language": language}
    if "use_cache" in forward:
        options["use_cache"] = False
    if "logits_to_keep" in forward:  # the head is the dearest matrix of a small model: run it where it is needed
        options["logits_to_keep"] = wanted
    logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **options).logits
    return logits if "logits_to_keep" in forward else logits[:, wanted]


def most_tokens(model: nn.Module) -> int | None:
    """How many positions a model has; None where nothing limits them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    most = getattr(text, "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def check_positions(model: nn.Module, tokens: int) -> None:
    """
    Raises:
        DataError: a row is longer than the model has positions for.
    """
    most = most_tokens(model)
    if most is not None and tokens > most:
        raise DataError(
            f"The model reads at most {most} tokens at a time; got a row of {tokens}. Pass max_length={most} or less, "
            "or shorter tasks and prompts."
        )


def _inner_forward(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the causal language model's forward, looking through PEFT's wrapper, which has none."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    return frozenset(inspect.signature(inner.forward).parameters)
