"""Statistics of weights: where a language pulls the MLPs' matrices.

In: a model and a language's rows. Out: of every layer, the change of each matrix after a few steps of tuning on that
language alone (DMoE, arXiv 2506.12388), or its mean gradient at the model's own weights (GradSim, EMNLP 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArchitectureError
from .blocks import Block
from .text import Batch

Vectors = list[dict[str, Tensor]]
"""One mapping a layer: matrix name -> tensor of its shape."""


def deviations(
    model: nn.Module, blocks: Sequence[Block], steps: Iterable[Sequence[Batch]], *, num_steps: int, learning_rate: float
) -> Vectors:
    """The change of every MLP matrix after tuning; the model is left as it was found, bit for bit.

    Args:
        model: in fp32 or fp64; all its parameters are tuned, without dropout.
        blocks: its decoder blocks.
        steps: the batches of each step, whose gradients are added up.
        num_steps: how many steps there are.
        learning_rate: of AdamW, without weight decay; falls linearly to 0 after the last step.
    """
    with _tunable(model):
        parameters = list(model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
        try:
            for batches in steps:
                optimizer.zero_grad()
                add_gradients(model, batches)
                optimizer.step()
                schedule.step()
            start = {id(parameter): tensor for parameter, tensor in zip(parameters, before, strict=True)}
            return [{n: p.detach() - start[id(p)] for n, p in block.matrices.items()} for block in blocks]
        finally:
            with torch.no_grad():
                for parameter, tensor in zip(parameters, before, strict=True):
                    parameter.copy_(tensor)


def mean_gradients(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> Vectors:
    """The gradient of the mean loss of all tokens in the batches, of every MLP matrix."""
    with _tunable(model, only=[matrix for block in blocks for matrix in block.matrices.values()]):
        add_gradients(model, batches)
        return [{n: p.grad.clone() for n, p in block.matrices.items() if p.grad is not None} for block in blocks]


def add_gradients(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Add the gradient of the mean next-token loss over all batches, however the rows are shared out among them."""
    # What stands in padding, or is predicted from there, is no target.
    targets = [(batch.attention_mask[:, 1:] * batch.attention_mask[:, :-1]).bool() for batch in batches]
    total = sum(int(mask.sum()) for mask in targets)
    for batch, mask in zip(batches, targets, strict=True):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1][mask].float(), batch.input_ids[:, 1:][mask], reduction="sum")
        (loss / total).backward()


@contextmanager
def _tunable(model: nn.Module, only: Sequence[nn.Parameter] | None = None) -> Iterator[None]:
    """Gradients for all parameters, or for some, and none left behind; everything is put back at the end."""
    small = sorted({str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)})
    if small:
        raise ArchitectureError(
            f"The model's weights are {', '.join(small)}, in which a small step is rounded away. Load it in float32."
        )
    parameters = list(model.parameters())
    state = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    wanted = {id(parameter) for parameter in (parameters if only is None else only)}
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, (required, gradient) in zip(parameters, state, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = gradient
