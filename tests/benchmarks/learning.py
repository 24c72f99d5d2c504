"""The training loop of the benchmarks that learn something."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm


def train(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    rate: float,
    schedule: Callable[[int], float],
    *,
    steps: int,
    label: str | None = None,
    **adamw: Any,
) -> None:
    """AdamW on what wants a gradient, with gradients clipped at 1; leaves the model in evaluation mode.

    Args:
        batches: arguments of the model, one optimizer step each.
        schedule: step -> share of `rate`.
        label: of the progress bar; None for no bar.
        adamw: further arguments of the optimizer.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, **adamw)
    schedule_of_rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for batch in tqdm(batches, desc=label, total=steps, disable=None if label else True):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule_of_rate.step()
        optimizer.zero_grad()
    model.eval()


def cosine(steps: int, warm_up: int = 20, floor: float = 0.05) -> Callable[[int], float]:
    """Linear warm-up times a cosine down to `floor`."""
    return lambda s: min(1.0, (s + 1) / warm_up) * (floor + (1 - floor) * (1 + math.cos(math.pi * s / steps)) / 2)
