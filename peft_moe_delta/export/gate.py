"""The gate before anything is written: the exported model computes what the original computes.

In: two models. Out: the largest difference of their fp32 logits on random tokens, or an error. Logits, not greedy text:
a wrong export can still agree on the next few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import GraftError

SEQUENCES, LENGTH, PADDING = 4, 24, 7
"""Size of the random batch; the last sequence starts with `PADDING` masked tokens."""


@torch.no_grad()
def check_equal_logits(
    reference: Callable[..., Any],
    exported: PreTrainedModel,
    *,
    languages: int | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """Compare logits over random token ids, with left padding in one sequence.

    Args:
        reference: the original model, or any callable that takes `input_ids` and `attention_mask`, both LongTensor
            (batch, sequence), and returns an output with fp32 `.logits` (batch, sequence, vocabulary).
        exported: the exported model, in fp32.
        languages: for models that take `language_ids`, how many there are: they take turns, token by token.
        tolerance: largest absolute difference allowed.
        seed: of the token ids.

    Returns:
        The largest absolute difference of the logits at tokens that are not padding.

    Raises:
        GraftError: a model is not in fp32, the logits' shapes differ, or they differ by more than `tolerance`.
    """
    batch = random_batch(exported, languages=languages, seed=seed)
    expected, actual = _logits(reference, batch), _logits(exported, batch)
    if expected.dtype != torch.float32 or actual.dtype != torch.float32:
        raise GraftError(
            f"Exactness is checked in fp32; got logits in {expected.dtype} from the original and {actual.dtype} from "
            "the exported model, whose rounding would hide or feign a difference. Convert both with .float()."
        )
    if expected.shape != actual.shape:
        raise GraftError(
            f"The exported model's logits have shape {tuple(actual.shape)}, the original's {tuple(expected.shape)}. "
            "Both must have the same vocabulary."
        )
    difference = (expected.to(actual.device) - actual)[batch["attention_mask"].bool()].abs().max().item()
    if not difference <= tolerance:
        raise GraftError(
            f"The exported {type(exported).__name__} is not exact: its logits differ from the original's by up to "
            f"{difference:.3g}, more than {tolerance:g}. Do not use it; please report the two configs."
        )
    return difference


@torch.no_grad()
def check_finite_logits(exported: PreTrainedModel, *, languages: int | None = None) -> None:
    """Refuse a 16-bit export whose weights are finite but whose states are not: fp16 ends at 65,504.

    Raises:
        GraftError: a logit over the random batch is infinite or not a number.
    """
    batch = random_batch(exported, languages=languages)
    if not _logits(exported, batch)[batch["attention_mask"].bool()].isfinite().all():
        raise GraftError(
            f"The exported {type(exported).__name__} computes logits that are not finite in {exported.dtype}: it "
            "overflows. Graft onto a bf16 or fp32 copy of the post-trained model."
        )


def random_batch(model: PreTrainedModel, *, languages: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """What is compared: random `input_ids` on the model's device and an `attention_mask` with left padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :PADDING] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if languages is not None:
        batch["language_ids"] = (torch.arange(SEQUENCES * LENGTH) % languages).view(SEQUENCES, LENGTH)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _logits(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Logits in evaluation mode, (batch, sequence, vocabulary), on the model's own device."""
    if isinstance(model, nn.Module):
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with evaluating(model):
        return model(**batch).logits


@contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Switch a module's dropout off, and its modules back to what they were."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
