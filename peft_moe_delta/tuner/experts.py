"""Experts made from an MLP: full copies, or low-rank changes over the frozen original.

In: the base model's MLP module. Out: a module that is called like it and, untrained, computes the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..architectures import linear_maps
from ..delta import low_rank_weight

_NOTHING: Mapping[int, Any] = MappingProxyType({})


class LowRankLinear(nn.Module):
    """A linear map `W_0 + B A` whose `W_0` belongs to the base model.

    `A` is (rank, in), `B` is (out, rank) and starts at zero. The frozen map is called, not owned: it is neither moved,
    saved nor counted with this module.
    """

    def __init__(self, frozen: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        weight = frozen.weight
        # Conv1D (GPT-2) stores its weight as (in, out)
        self.transposed = isinstance(frozen, Conv1D)
        out_features, in_features = reversed(weight.shape) if self.transposed else weight.shape
        device = "meta" if _building_on_meta() else weight.device
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=weight.dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=weight.dtype, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self._frozen = (frozen,)  # in a tuple, so that torch does not register it

    @property
    def frozen(self) -> nn.Linear | Conv1D:
        """The base model's linear map."""
        return self._frozen[0]

    @property
    def weight(self) -> Tensor:
        """`W_0 + B A` in the frozen weight's own layout."""
        return low_rank_weight(self.frozen.weight, self.A, self.B, transposed=self.transposed)

    @property
    def bias(self) -> Tensor | None:
        """The frozen map's bias."""
        return self.frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        # PEFT keeps A and B in fp32 over a 16-bit model: each map runs in its own dtype.
        change = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)
        result = self.frozen(x.to(self.frozen.weight.dtype))
        return (result + change).to(result.dtype)


def full_expert(mlp: nn.Module, keep: Mapping[int, Any] = _NOTHING) -> nn.Module:
    """A trainable copy of an MLP, without the hooks that anyone attached to the original.

    `keep` maps the `id` of a part to what stands in its place, as `copy.deepcopy` takes it.
    """
    on_meta = _building_on_meta()
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta") if on_meta else p.detach().clone())
        for p in mlp.parameters()
    }
    return _without_hooks(copy.deepcopy(mlp, {**memo, **keep}))


def low_rank_expert(mlp: nn.Module, rank: int, keep: Mapping[int, Any] = _NOTHING) -> nn.Module:
    """A copy of an MLP's structure in which every linear map is a `LowRankLinear` over the original one.

    `keep` as in `full_expert`.
    """
    memo = {id(frozen): LowRankLinear(frozen, rank) for frozen in linear_maps(mlp).values() if id(frozen) not in keep}
    return _without_hooks(copy.deepcopy(mlp, {**memo, **keep}))


def expert_weights(expert: nn.Module, mlp: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of an expert's weights under the MLP's own parameter names, low-rank ones summed up."""
    for name, _ in mlp.named_parameters():
        owner, _, attribute = name.rpartition(".")
        yield name, getattr(expert.get_submodule(owner), attribute).detach()


def _building_on_meta() -> bool:
    """Whether PEFT asked for empty weights (`low_cpu_mem_usage`): it patches parameter registration, not copying."""
    return nn.Linear(1, 1, bias=False).weight.is_meta


def _without_hooks(module: nn.Module) -> nn.Module:
    """Strip accelerate's and torch's hooks, which would act on the original."""
    remove_hook_from_module(module, recurse=True)
    for child in module.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
        child._backward_hooks.clear()
    return module
