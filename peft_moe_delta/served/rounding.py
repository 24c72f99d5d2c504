"""How far a type of GGUF's may move log-probabilities: measured in transformers, rounded as llama.cpp rounds.

In: a `Reference` and token ids. Out: a tolerance. On a CPU llama.cpp multiplies a matrix with inputs that it has
rounded to the type of its weights, for q8_0 in blocks along a row as well, so both are rounded here. What is left is
the order of sums.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..errors import ServingError
from .reference import Reference

BLOCK = 32  # weights of a row that share a scale in q8_0; the converter writes rows that are no whole blocks in f16
SLACK = 1.5
"""In q8_0 llama.cpp is off by 0.99 to 1.23 times what this rounding makes of the demo's mixture, language by language,
and by at most 1.1 times in 26 small random mixtures: sums in another order move a few inputs to the next step, and
near-tied experts may fall differently. Two experts exchanged in one layer of the small ones were off by 1.6 times at
least."""
KEPT = re.compile(r"(\.gate|\.router(\.layer)?|shared_expert_gate)\.weight$")
"""Routers, which the converter keeps in f32, as everything that is no matrix."""


def tolerance_for(reference: Reference, prompts: Sequence[Sequence[int]], outtype: str) -> float:
    """How far a file of a type may be off: what rounding its weights and their inputs does to these prompts, times
    `SLACK`, and no less than the reference's own tolerance. The reference's model is rounded afterwards.

    Raises:
        ServingError: the extra `gguf` is not installed.
    """
    if outtype == "f32":
        return reference.tolerance
    before = [reference.logprobs(prompt) for prompt in prompts]
    round_weights(reference.model, outtype)
    with RoundedInputs(reference.model, outtype):
        after = [reference.logprobs(prompt) for prompt in prompts]
    moved = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True) if len(a))
    return max(reference.tolerance, SLACK * moved)


@torch.no_grad()
def round_weights(model: Any, outtype: str) -> None:
    """Give a model the weights that a file of a type holds, in place."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and not KEPT.search(name):
            weight.copy_(rounded(weight, outtype))


class RoundedInputs(TorchFunctionMode):
    """Within the block, every matrix of a model but the routers reads its inputs rounded to a type. From then on the
    model computes expert after expert, so that each of their matrices is a linear map as well."""

    def __init__(self, model: Any, outtype: str) -> None:
        super().__init__()
        model.set_experts_implementation("eager")
        self._outtype = outtype
        self._kept = {weight.data_ptr() for name, weight in model.named_parameters() if KEPT.search(name)}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is linear and args[1].data_ptr() not in self._kept:
            args = (rounded(args[0], self._outtype).to(args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))


def rounded(weight: Tensor, outtype: str) -> Tensor:
    """A matrix, or several, as a type stores it, (..., columns) in fp32; inputs of one as llama.cpp rounds them.

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
