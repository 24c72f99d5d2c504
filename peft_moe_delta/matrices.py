"""What a matrix of a block is: a linear map whose weight is floats, or one that is quantised and can only be called.

In: the modules and weights of an MLP or an attention. Out: the linear maps among them, their sizes, and whether a
weight can be read, copied and trained. Quantised maps of bitsandbytes and torchao are `nn.Linear`s that pack their
weight as they like, so everything here asks the module and nothing looks into the packing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import ArchitectureError
from .tensors import sampled_rows

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights are made of that can be read and trained."""


def linear_maps(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Name, inside a block, -> linear map (`nn.Linear`, quantised or not, or GPT-2's `Conv1D`)."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def unknown_maps(block: nn.Module) -> dict[str, nn.Module]:
    """Name, inside a block, -> linear map of integers that is no `nn.Linear`, as GPTQ, AWQ, GGUF and HQQ have them."""
    return {
        name: module
        for name, module in block.named_modules()
        if hasattr(module, "in_features")
        and not isinstance(module, nn.Linear)
        and any(not t.is_floating_point() for t in (*module.parameters(False), *module.buffers(False)))
    }


def features(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Sizes of a linear map's input and output, whatever its weight looks like."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is not the numbers that it stands for.

    bitsandbytes keeps integers, or their bytes under a float's name, with a `quant_state`. torchao keeps several
    tensors that call themselves one; so does a sharded tensor, which is whole again as `full_tensor()`.
    """
    packed = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")
    return weight.dtype not in FLOATS or packed or hasattr(weight, "quant_state")


def float_weight(linear: nn.Linear | Conv1D) -> Tensor:
    """A linear map's weight, to compute with.

    Raises:
        ArchitectureError: it is quantised.
    """
    if is_quantised(linear.weight):
        raise ArchitectureError(
            f"The weight of this {type(linear).__name__} is quantised, and its numbers are not at hand. Load the base "
            "model unquantised to read an expert's weights; running and training it needs none."
        )
    return linear.weight


def quantised_weights(module: nn.Module) -> list[str]:
    """Names of a module's quantised parameters."""
    return [name for name, parameter in module.named_parameters() if is_quantised(parameter)]


def fewest_rows(block: nn.Module) -> int:
    """Rows that a block must be called with at least: the CPU kernel of bitsandbytes 0.50 dies (SIGFPE) of none."""
    return 1 if any(is_quantised(parameter) for parameter in block.parameters()) else 0


def check_gradient(linear: nn.Module, x: Tensor, result: Tensor) -> None:
    """Refuse a quantised map that stops gradients, without which the experts before it would learn nothing.

    Raises:
        ArchitectureError: a gradient is wanted, and the map's kernel has none.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return
    kind = type(linear).__name__
    if not result.requires_grad:
        raise ArchitectureError(
            f"The base model's quantised {kind} passes no gradient, so experts before it cannot learn. Train over "
            "bitsandbytes (4 or 8 bit) or torchao's Int8WeightOnlyConfig; this base can only be evaluated."
        )
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ArchitectureError(
            f"bitsandbytes has repacked this {kind} for evaluation on this CPU (AVX512-BF16), and its repacked form "
            "passes no gradient. Load the base model again and train before you evaluate, or train on a GPU."
        )


@torch.no_grad()
def squared_norm(linear: nn.Linear | Conv1D) -> Tensor:
    """`||W||^2`, fp32; of a quantised map estimated from a few columns, which are what it makes of unit vectors."""
    weight = linear.weight
    if not is_quantised(weight):
        return weight.float().square().sum()
    size, _ = features(linear)
    chosen = sampled_rows(size)
    units = torch.zeros(len(chosen), size, dtype=weight.dtype if weight.is_floating_point() else torch.float32)
    units[range(len(chosen)), chosen] = 1
    columns = linear.forward(units.to(weight.device)).float()
    if linear.bias is not None:
        columns = columns - linear.bias.float()
    return columns.square().sum() * (size / len(chosen))
