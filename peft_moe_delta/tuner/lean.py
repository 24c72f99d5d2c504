"""Experts that keep less for their backward pass: what is between their linear maps is computed again in it.

An MLP is a few products of matrices with cheap functions between them. Autograd keeps every result: of a gated MLP the
input and four times the intermediate size. Here it keeps the input and what the first maps gave, and makes the input
of the last map anew from that, with no product done twice: a gated MLP keeps twice the intermediate size.

`torch.utils.checkpoint` with a policy does the same, but an outer checkpoint does not find the tensors that it keeps:
whoever checkpoints decoder layers, to keep nothing in them, would keep all of this.

Shape legend: R rows, D hidden size, F what is given to the last map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..matrices import features, is_quantised
from .experts import LowRankLinear, hooked, parameters_of

LinearMap = nn.Linear | Conv1D | LowRankLinear


class StandIn:
    """`self` of an MLP's own `forward`, with `run(name, x)` in the place of each of its linear maps."""

    def __init__(self, mlp: nn.Module, run: Callable[[str, Tensor], Tensor]) -> None:
        self._mlp, self._run = mlp, run

    def __call__(self, *given: Tensor) -> Tensor:
        y: Tensor = type(self._mlp).forward(self, *given)
        return y

    def __getattr__(self, name: str) -> Any:
        part = getattr(self._mlp, name)
        return partial(self._run, name) if isinstance(part, LinearMap) else part


def of_maps_alone(mlp: nn.Module) -> bool:
    """Whether all of an MLP's weights are in linear maps of floats, and nobody's code or hooks are around its own."""
    maps = [part for part in mlp._modules.values() if isinstance(part, nn.Linear | Conv1D)]
    if watched(mlp) or any(is_quantised(part.weight) for part in maps):
        return False
    plain = all(type(part) in (nn.Linear, Conv1D) for part in maps)
    return plain and len(list(parameters_of(mlp))) == sum(1 + (part.bias is not None) for part in maps)


def watched(expert: nn.Module) -> bool:
    """Whether hooks, or a `forward` that was put in the place of the class's own, as accelerate does, see it run."""
    parts = [expert, *expert._modules.values()]
    parts += [part.frozen for part in parts if isinstance(part, LowRankLinear)]
    return any("forward" in part.__dict__ for part in parts if part is not None) or hooked(expert)


def can_be_lean(mlp: nn.Module) -> bool:
    """Whether an MLP's code is first maps of its input, functions without chance, and one last map.

    Found by running the code on tensors without content, hence to be asked once, when experts are made.
    """
    if not of_maps_alone(mlp) or any(isinstance(part, nn.Dropout) and part.p > 0 for part in mlp.modules()):
        return False
    if any("dropout" in name and value for name, value in vars(mlp).items()):
        return False
    x, last = torch.empty(0, 1, device="meta"), []  # of no rows: code that needs it for more than its maps fails

    def run(name: str, given: Tensor) -> Tensor:
        if given is x:
            return torch.empty(2, features(getattr(mlp, name))[1], device="meta")
        last.append(given)
        return given

    try:
        y = StandIn(mlp, run)(x)
    except Exception:  # whatever a stranger's code does with what it cannot use
        return False
    return len(last) == 1 and y is last[0]


def run_lean(expert: nn.Module, x_RD: Tensor) -> Tensor:
    """What an expert makes of rows, (R, D), keeping less."""
    if not worth_it() or watched(expert):
        y_RD: Tensor = expert(x_RD)
        return y_RD
    return leanly(expert, x_RD, lambda name: getattr(expert, name), lambda name: _last_map(getattr(expert, name)))


def worth_it() -> bool:
    """Whether a backward pass may follow for which PyTorch does not find by itself what is cheap to compute again."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def leanly(
    mlp: nn.Module,
    x_RD: Tensor,
    first: Callable[[str], Callable[[Tensor], Tensor]],
    last: Callable[[str], tuple[LastMap, Sequence[Tensor]]],
) -> Tensor:
    """What an MLP's code makes of rows with other linear maps, by name, in the place of its own."""
    firsts: list[Tensor] = []
    lasts: list[str] = []

    def run(name: str, given: Tensor) -> Tensor:
        if given is not x_RD:
            lasts.append(name)
            return given
        with torch.enable_grad():
            firsts.append(first(name)(x_RD))
        return firsts[-1].detach()

    with torch.no_grad():
        h_RF = StandIn(mlp, run)(x_RD)
    (name,) = lasts
    product, weights = last(name)
    like = x_RD.new_empty((), dtype=product.dtype).expand(x_RD.shape)
    kept_RD = _Kept.apply(like, _Between(mlp), product, len(firsts), *firsts, *weights)
    y_RD: Tensor = _WithValue.apply(kept_RD, product, h_RF, *(weight.detach() for weight in weights))
    return y_RD


@dataclass(frozen=True)
class _Between:
    """What an MLP's code does between its maps."""

    mlp: nn.Module

    def __call__(self, firsts: Iterable[Tensor], x: Tensor) -> Tensor:
        """The last map's input, (R, F), of what the first ones gave, in their order; `x` only tells them apart."""
        made = iter(firsts)
        return StandIn(self.mlp, lambda name, given: next(made) if given is x else given)(x)


class LastMap(Protocol):
    """A linear map whose input is not kept. It has no weights itself, as those are kept where autograd keeps them."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what it gives."""

    def __call__(self, h_RF: Tensor, *weights: Tensor) -> Tensor:
        """The product, (R, D)."""

    def gradients(
        self, dy_RD: Tensor, h_RF: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Of `h_RF` and of each weight that is wanted."""


class _Kept(torch.autograd.Function):
    """The last map's output in the graph, (R, D), still without its value.

    What it keeps, it keeps before the product is computed: a checkpoint around it that computes it again stops there,
    as it has what was kept.
    """

    @staticmethod
    def forward(ctx: Any, like: Tensor, between: _Between, last: LastMap, num_firsts: int, *tensors: Tensor) -> Tensor:
        ctx.between, ctx.last, ctx.num_firsts = between, last, num_firsts
        kind = like.device.type
        ctx.autocast = nullcontext()
        if torch.is_autocast_enabled(kind):
            ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind))
        ctx.save_for_backward(*tensors)
        return like.detach()

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Any, ...]:
        tensors, wanted, num = ctx.saved_tensors, ctx.needs_input_grad[4:], ctx.num_firsts
        firsts = [tensor.detach().requires_grad_() for tensor in tensors[:num]]
        with torch.enable_grad(), ctx.autocast:
            h_RF = ctx.between(firsts, dy_RD)
        dh_RF, of_weights = ctx.last.gradients(dy_RD, h_RF.detach(), tensors[num:], wanted[num:])
        if any(wanted[:num]):
            torch.autograd.backward(h_RF, dh_RF.to(h_RF.dtype))  # not `grad`, in which PyTorch's counters cannot hook
        return None, None, None, None, *(first.grad for first in firsts), *of_weights


class _WithValue(torch.autograd.Function):
    """The last map's output; gradients go to what stands for it in the graph."""

    @staticmethod
    def forward(ctx: Any, kept_RD: Tensor, last: LastMap, h_RF: Tensor, *weights: Tensor) -> Tensor:
        ctx.num = len(weights)
        return last(h_RF, *weights)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Any, ...]:
        return dy_RD, None, None, *[None] * ctx.num


def _last_map(part: LinearMap) -> tuple[LastMap, Sequence[Tensor]]:
    """An expert's map as one whose input is not kept, and its weights."""
    if isinstance(part, LowRankLinear):
        weights = _computed_with(part.frozen) + _computed_with(part)
        return _LowRank(weights[0].dtype, isinstance(part.frozen, Conv1D)), weights
    weights = _computed_with(part)
    return _Full(weights[0].dtype, isinstance(part, Conv1D)), weights


def _computed_with(part: LinearMap) -> tuple[Tensor, ...]:
    """A map's own parameters, under autocast in its dtype."""
    own = [tensor for tensor in part._parameters.values() if tensor is not None]
    kind = own[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tuple(own)
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in own)


@dataclass(frozen=True)
class _Full:
    """`h W^T + b`; of GPT-2's map `h W + b`."""

    dtype: torch.dtype
    transposed: bool

    def __call__(self, h_RF: Tensor, *weights: Tensor) -> Tensor:
        return _product(h_RF, weights, self.transposed)

    def gradients(
        self, dy_RD: Tensor, h_RF: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        return _gradients(dy_RD, h_RF, weights, wanted, self.transposed)


@dataclass(frozen=True)
class _LowRank:
    """`h W_0^T + b + (h A^T) B^T`."""

    dtype: torch.dtype
    transposed: bool

    def __call__(self, h_RF: Tensor, *weights: Tensor) -> Tensor:
        *frozen, a, b = weights
        result = _product(h_RF, frozen, self.transposed)
        return (result + F.linear(F.linear(h_RF.to(a.dtype), a), b)).to(result.dtype)

    def gradients(
        self, dy_RD: Tensor, h_RF: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        *frozen, a, b = weights
        dh_RF, of_frozen = _gradients(dy_RD, h_RF, frozen, wanted[:-2], self.transposed)
        dy_RD, h_RF = dy_RD.to(a.dtype), h_RF.to(a.dtype)
        inner = dy_RD @ b
        of_a, of_b = (inner.T @ h_RF, dy_RD.T @ (h_RF @ a.T)) if any(wanted[-2:]) else (None, None)
        return dh_RF + (inner @ a).to(dh_RF.dtype), [*of_frozen, of_a, of_b]


def _product(h_RF: Tensor, weights: Sequence[Tensor], transposed: bool) -> Tensor:
    weight, *bias = weights
    return F.linear(h_RF.to(weight.dtype), weight.T if transposed else weight, *bias)


def _gradients(
    dy_RD: Tensor, h_RF: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool], transposed: bool
) -> tuple[Tensor, list[Tensor | None]]:
    weight, h_RF = weights[0], h_RF.to(dy_RD.dtype)
    dh_RF = dy_RD @ (weight.T if transposed else weight)
    of_weight = None
    if wanted[0]:
        of_weight = h_RF.T @ dy_RD if transposed else dy_RD.T @ h_RF
    return dh_RF, [of_weight, *(dy_RD.sum(0) if bias else None for bias in wanted[1:])]
