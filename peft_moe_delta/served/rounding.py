"""How far a type of GGUF's may move log-probabilities: measured in transformers, on weights rounded as that type does.

In: a `Reference` and token ids. Out: a tolerance. llama.cpp rounds what it multiplies these weights with as well, about
as much again, and where two experts are close, either rounding may choose the other. So a file that is right stays
within a few times of it; one that is wrong is off by far more.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ServingError
from .reference import Reference

BLOCK = 32  # weights of a row that share a scale in q8_0; the converter writes rows that are no whole blocks in f16
SLACK = 3.0
KEPT = re.compile(r"(\.gate|\.router\.layer|shared_expert_gate)\.weight$")
"""Routers, which the converter keeps in f32, as everything that is no matrix."""


def tolerance_for(reference: Reference, prompts: Sequence[Sequence[int]], outtype: str) -> float:
    """How far a file of a type may be off: what rounding its weights does to these prompts, times `SLACK`, and no less
    than the reference's own tolerance. The reference's model is rounded afterwards.

    Raises:
        ServingError: the extra `gguf` is not installed.
    """
    if outtype == "f32":
        return reference.tolerance
    before = [reference.logprobs(prompt) for prompt in prompts]
    round_weights(reference.model, outtype)
    after = [reference.logprobs(prompt) for prompt in prompts]
    moved = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True) if len(a))
    return max(reference.tolerance, SLACK * moved)


@torch.no_grad()
def round_weights(model: Any, outtype: str) -> None:
    """Give a model the weights that a file of a type holds, in place."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and not KEPT.search(name):
            weight.copy_(rounded(weight, outtype))


def rounded(weight: Tensor, outtype: str) -> Tensor:
    """A matrix, or several, as a type stores it, (..., columns) in fp32.

    Raises:
        ServingError: the extra `gguf` is not installed.
    """
    if outtype == "q8_0" and weight.shape[-1] % BLOCK == 0:
        quants, kind = _gguf().quants, _gguf().GGMLQuantizationType.Q8_0
        stored = quants.quantize(weight.detach().float().cpu().numpy(), kind)
        return torch.from_numpy(quants.dequantize(stored, kind)).to(weight.device)
    return weight.to(torch.bfloat16 if outtype == "bf16" else torch.float16).float()


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ServingError(
            f"The package gguf, which says what q8_0 keeps of a weight, cannot be imported ({error}). Install the "
            "extra `gguf` (pip install 'peft-moe-delta[gguf]')."
        ) from error
