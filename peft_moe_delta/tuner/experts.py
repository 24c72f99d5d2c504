"""Experts made from an MLP: full copies, or low-rank changes over the frozen original.

In: the base model's MLP module. Out: a module that is called like it and, untrained, computes the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..matrices import check_gradient, features, float_weight, is_quantised, linear_maps
from ..tensors import low_rank_weight
from .processes import is_sharded, is_stand_in

_NOTHING: Mapping[int, Any] = MappingProxyType({})


class LowRankLinear(nn.Module):
    """A linear map `W_0 + B A` whose `W_0` belongs to the base model.

    `A` is (rank, in), `B` is (out, rank) and starts at zero. The frozen map is called, not owned: it is neither moved,
    saved nor counted with this module. So it may be quantised: nothing but `weight` reads it.
    """

    def __init__(self, frozen: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        weight = frozen.weight
        self.quantised = is_quantised(weight)
        # As PEFT's LoRA has it: in the dtype that the weight says, in fp32 where it says integers.
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        in_features, out_features = features(frozen)
        device = "meta" if _building_on_meta() else weight.device
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self._frozen = (frozen,)  # in a tuple, so that torch does not register it

    @property
    def frozen(self) -> nn.Linear | Conv1D:
        """The base model's linear map."""
        return self._frozen[0]

    @property
    def weight(self) -> Tensor:
        """`W_0 + B A` in the frozen weight's own layout, which is (in, out) in GPT-2's `Conv1D`."""
        transposed = isinstance(self.frozen, Conv1D)
        return low_rank_weight(float_weight(self.frozen), self.A, self.B, transposed=transposed)

    @property
    def bias(self) -> Tensor | None:
        """The frozen map's bias."""
        return self.frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        # PEFT keeps A and B in fp32 over a 16-bit model: each map runs in its own dtype.
        change = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)
        # Past the hooks of the base model's map: which experts run, and how often, depends on the batch. A quantised
        # one gets what the base model would give it.
        result: Tensor = self.frozen.forward(x if self.quantised else x.to(self.frozen.weight.dtype))
        check_gradient(self.frozen, x, result)
        return (result + change).to(result.dtype)


class Experts(nn.ModuleList):
    """An adapter's new experts in one layer: to whoever hooks modules, one module that runs once a pass.

    Frameworks that shard parameters act in hooks, on every process, and must find the same modules in the same order
    there, while which experts have tokens depends on the batch. So inside, hooks are passed by; and whoever has no
    tokens is not called, and costs nothing.
    """

    def forward(
        self, inputs: Mapping[int, Tensor], run: Callable[[int, nn.Module, Tensor], Tensor]
    ) -> dict[int, Tensor]:
        """`run(index, expert, input)` by index, ascending; indices count expert 0, which is not among these."""
        return {index: run(index, unhooked(self[index - 1]), inputs[index]) for index in sorted(inputs)}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether the module or a part of it has hooks of its own. Asked in every pass, hence written to be fast."""
    parts: list[nn.Module] = [module]
    for part in parts:
        own = part.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        parts += [child for child in own["_modules"].values() if child is not None]
    return False


def unhooked(module: nn.Module) -> nn.Module:
    """The module, or, where it or a part has hooks, a view of it without: same parameters, buffers and settings."""
    if torch.compiler.is_compiling() or not hooked(module):
        return module
    view = object.__new__(type(module))
    parts = {name: part if part is None else unhooked(part) for name, part in module._modules.items()}
    view.__dict__ = {**module.__dict__, **dict.fromkeys(_HOOKS, _NOTHING), "_modules": parts}
    return view


class _Together(torch.autograd.Function):
    """Parameters as they are; their gradients arrive all at once, zeros for those that nothing used."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def arriving_together(modules: Sequence[nn.Module | None]) -> list[Any]:
    """The modules, or views of them whose parameters get their gradients in one order, whatever the batch holds.

    DeepSpeed's ZeRO-2 adds up what comes from all processes in the order in which it comes, without looking. (It and
    ZeRO-1 are known by what they put onto parameters. Others go by names, and need nothing.)
    """
    present = [module for module in modules if module is not None]
    trained = [p for module in present for p in parameters_of(module) if p.requires_grad and hasattr(p, "_hp_mapping")]
    if not trained or not torch.is_grad_enabled():
        return list(modules)
    # Each through a node of its own: of nodes that may run, autograd takes the youngest, but those that add gradients
    # up are all alike to it, and which of several ready ones comes first depends on what else is waiting.
    own = [parameter.view_as(parameter) for parameter in trained]
    instead = dict(zip(map(id, trained), _Together.apply(*own), strict=True))
    return [module if module is None else _substituted(module, instead) for module in modules]


def _substituted(module: nn.Module, instead: Mapping[int, Tensor]) -> nn.Module:
    """A view of a module with other tensors in the place of parameters, by their `id`."""
    view = object.__new__(type(module))
    parts = {name: part if part is None else _substituted(part, instead) for name, part in module._modules.items()}
    own = {name: instead.get(id(parameter), parameter) for name, parameter in module._parameters.items()}
    view.__dict__ = {**module.__dict__, "_parameters": own, "_modules": parts}
    return view


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """As `module.parameters()`, at a tenth of the cost: no names, nothing is looked for twice."""
    yield from (parameter for _, parameter in _owned(module))


def input_dtype(expert: nn.Module) -> torch.dtype | None:
    """What an expert's input is cast to: the dtype of its weights; None where its maps see to that themselves."""
    owner, weight = next(_owned(expert))
    return None if isinstance(owner, LowRankLinear) or is_quantised(weight) else weight.dtype


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every parameter with the module that has it."""
    yield from ((module, parameter) for parameter in module._parameters.values() if parameter is not None)
    for part in module._modules.values():
        if part is not None:
            yield from _owned(part)


def full_expert(mlp: nn.Module, keep: Mapping[int, Any] = _NOTHING) -> nn.Module:
    """A trainable copy of an MLP, without the hooks that anyone attached to the original.

    `keep` maps the `id` of a part to what stands in its place, as `copy.deepcopy` takes it. The copy of a sharded MLP
    has no content until it is sharded, too (`take_shards`).
    """
    return _without_hooks(copy.deepcopy(mlp, {**_copies(mlp.parameters()), **keep}))


def low_rank_expert(mlp: nn.Module, rank: int, keep: Mapping[int, Any] = _NOTHING) -> nn.Module:
    """A copy of an MLP's structure in which every linear map is a `LowRankLinear` over the original one.

    `keep` as in `full_expert`.
    """
    linear = linear_maps(mlp)
    memo = _copies(p for name, p in mlp.named_parameters() if name.rpartition(".")[0] not in linear)
    memo |= {id(frozen): LowRankLinear(frozen, rank) for frozen in linear.values() if id(frozen) not in keep}
    return _without_hooks(copy.deepcopy(mlp, {**memo, **keep}))


def _copies(parameters: Iterable[Tensor]) -> dict[int, Any]:
    """For `copy.deepcopy`: copies of parameters, by the `id` of what they are of."""
    found: dict[int, Any] = {}
    if not (originals := list(parameters)):
        return found  # to ask below draws a random number
    on_meta, stand_in = _building_on_meta(), is_stand_in()
    for p in originals:
        if on_meta or is_sharded(p):
            copied = torch.empty(p.shape, dtype=p.dtype, device="meta")
        else:
            copied = torch.empty_like(p) if stand_in else p.detach().clone()
        found[id(p)] = nn.Parameter(copied)
    return found


def take_shards(expert: nn.Module, mlp: nn.Module) -> None:
    """Give a copy of a sharded MLP, when it is sharded itself, this process's shards of what the MLP has."""
    for name, parameter in list(expert.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            shard = nn.Parameter(mlp.get_parameter(name).detach().clone(), requires_grad=parameter.requires_grad)
            expert.get_submodule(owner)._parameters[attribute] = shard  # PEFT's `low_cpu_mem_usage` patches the setter


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
        child._load_state_dict_post_hooks.clear()
    return module
