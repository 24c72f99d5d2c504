"""Which base model an adapter belongs to.

In: the MLP blocks an adapter transforms. Out: their shapes and a few of their weights, rounded to bf16 so that loading
the same checkpoint in another dtype gives the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

_SAMPLES_PER_MODULE = 32
_FP16_MISMATCHES = 0.2
"""Share of samples that may differ where fp16 is involved: it rounds (and flushes) differently on the way to bf16."""


def fingerprint(mlps: Sequence[nn.Module]) -> dict[str, Any]:
    """Shapes of each block's parameters and sampled weights of the first, middle and last block.

    Args:
        mlps: the base model's MLP blocks in layer order.
    """
    shapes = [{name: list(p.shape) for name, p in mlp.named_parameters()} for mlp in mlps]
    sampled = [next(p for p in mlps[index].parameters() if p.dim() >= 2) for index in sampled_blocks(len(mlps))]
    return fingerprint_of(shapes, sampled)


def sampled_blocks(blocks: int) -> list[int]:
    """Which of the MLP blocks weights are sampled from."""
    return sorted({0, blocks // 2, blocks - 1})


def fingerprint_of(shapes: list[dict[str, list[int]]], sampled: Sequence[Tensor]) -> dict[str, Any]:
    """The same from what was read.

    Args:
        shapes: of each block's parameters.
        sampled: of each of the `sampled_blocks`, the first matrix in the order of definition.
    """
    samples: list[float] = []
    for weight in sampled:
        weight = weight.detach().reshape(-1)
        step = max(1, weight.numel() // _SAMPLES_PER_MODULE)
        samples += weight[::step][:_SAMPLES_PER_MODULE].to(torch.bfloat16).float().tolist()
    return {
        "blocks": len(shapes),
        "shapes": shapes[0] if all(shape == shapes[0] for shape in shapes) else shapes,
        "samples": samples,
        "dtype": str(sampled[0].dtype).removeprefix("torch."),
    }


def check_fingerprint(saved: dict[str, Any], found: dict[str, Any], *, verify_weights: bool) -> None:
    """Refuse a base model that an adapter was not made for.

    Raises:
        CheckpointError: other shapes; or, with `verify_weights`, other weights.
    """
    for key in ("blocks", "shapes"):
        if saved[key] != found[key]:
            raise CheckpointError(
                f"This adapter was made for another base model: its MLP {key} are {saved[key]}, the model's are "
                f"{found[key]}. Load the base model named in the adapter's config."
            )
    differing = sum(a != b for a, b in zip(saved["samples"], found["samples"], strict=True)) / len(found["samples"])
    tolerated = _FP16_MISMATCHES if "float16" in (saved["dtype"], found["dtype"]) else 0.0
    if verify_weights and differing > tolerated:
        raise CheckpointError(
            f"This adapter was trained on other base weights: {differing:.0%} of the sampled MLP weights differ. "
            "Experts are changes of one particular model. Load that base model, or pass verify_base=False if you "
            "know better (to move an adapter onto a post-trained model, use model.graft)."
        )
