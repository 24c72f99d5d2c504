"""All experts of a layer at once: one grouped matrix product for each of their matrices.

In: rows of hidden states, sorted by expert, and where each expert's rows end, which only the device knows. Out: what
the experts one by one would make of them. The host never waits for the device, and whatever languages a pass holds, it
is one graph for torch.compile.

An expert's own code runs once over the rows of all, with a product in the place of each of its linear maps. So it must
be made of linear maps and of functions that treat every row alike, as MLPs are.

Shape legend: R rows, I and O what a linear map takes and gives, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .experts import LowRankLinear, hooked
from .lean import StandIn, leanly, of_maps_alone, worth_it

GROUPED_MM = "grouped_mm"
IMPLEMENTATIONS = ("eager", GROUPED_MM)
"""How experts run, in transformers' words."""

_ALIGNED = 16
"""Bytes that a row of each factor must be a multiple of."""

grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
"""(R, I) times (E, I, O) by rows of each expert; None where this PyTorch has none."""


def can_be_grouped(experts: Sequence[nn.Module]) -> bool:
    """Whether these experts can run as one: nobody watches or shards them, and their sizes suit the product."""
    first = experts[0]
    if grouped_mm is None or not of_maps_alone(first) or any(hooked(expert) for expert in experts):
        return False
    maps = [part for part in first._modules.values() if isinstance(part, nn.Linear | Conv1D)]
    return all(size * part.weight.element_size() % _ALIGNED == 0 for part in maps for size in part.weight.shape)


class GroupedExperts:
    """Experts as one: an MLP's code over the rows of all."""

    def __init__(self, experts: Sequence[nn.Module], ends_E: Tensor, num_rows: int) -> None:
        self._experts, self._ends_E = experts, ends_E
        row_R = torch.arange(num_rows, device=ends_E.device)
        # Rows behind the last expert's, of choices that are not used, go along with it: their weight is 0.
        self._expert_R = torch.searchsorted(ends_E, row_R, right=True, out_int32=True).clamp(max=len(experts) - 1)
        self._unused_R1 = (row_R >= ends_E[-1])[:, None]

    def run(self, x_RI: Tensor, *, takes_residual: bool, lean: bool) -> Tensor:
        """The experts' output, (R, O); `lean`: keeping less of experts whose last maps are products alone."""
        first = self._experts[0]
        # Biases and low-rank changes would be kept for a gradient of their own.
        maps = self._experts[-1]._modules.values()
        products = not any(isinstance(one, LowRankLinear) or getattr(one, "bias", None) is not None for one in maps)
        if lean and products and worth_it():
            last = partial(self._last, x_dtype=x_RI.dtype)
            return leanly(first, x_RI, lambda name: partial(self._map, self._maps(name)), last)
        more = (torch.zeros_like(x_RI),) if takes_residual else ()
        return StandIn(first, lambda name, given: self._map(self._maps(name), given))(x_RI, *more)

    def _maps(self, name: str) -> list[Any]:
        return [getattr(expert, name) for expert in self._experts]

    def _last(self, name: str, x_dtype: torch.dtype) -> tuple[_LastProduct, list[Tensor]]:
        weights = [one.weight for one in self._maps(name)]
        return _LastProduct(_computed_in(x_dtype, weights), self._ends_E, self._unused_R1), weights

    def _map(self, maps: Sequence[Any], x_RI: Tensor) -> Tensor:
        """One linear map of every expert, each on its own rows."""
        first, new = maps[0], maps[1:]
        if any(isinstance(one, LowRankLinear) for one in new):
            change = self._product(
                self._product(x_RI, _padded([one.A for one in new], 0)), _padded([one.B for one in new], 1)
            )
            result: Tensor = first.forward(x_RI.to(first.weight.dtype))
            return (result + change).to(result.dtype)
        weights = [one.weight.T if isinstance(one, Conv1D) else one.weight for one in maps]
        y_RO = self._product(x_RI, weights)
        if first.bias is None:
            return y_RO
        return y_RO + torch.stack([one.bias for one in maps])[self._expert_R].to(y_RO.dtype)

    def _product(self, x_RI: Tensor, weights_OI: Sequence[Tensor]) -> Tensor:
        return _product(x_RI, weights_OI, self._ends_E, self._unused_R1)


def _product(x_RI: Tensor, weights_OI: Sequence[Tensor], ends_E: Tensor, unused_R1: Tensor) -> Tensor:
    return grouped_product(x_RI.to(_computed_in(x_RI.dtype, weights_OI)), list(weights_OI), ends_E, unused_R1)


def _computed_in(x_dtype: torch.dtype, weights_OI: Sequence[Tensor]) -> torch.dtype:
    kind = weights_OI[0].device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    # Experts may be fp32 over a 16-bit model: none of them is rounded.
    return reduce(torch.promote_types, (weight.dtype for weight in weights_OI), x_dtype)


def _padded(matrices: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Expert 0's, which is zero, and the others', whose rank is filled up with zeros to what the product takes."""
    first = matrices[0]
    size = list(first.shape)
    missing = -size[dim] % (_ALIGNED // first.element_size())
    padding = (0, 0, 0, missing) if dim == 0 else (0, missing)
    size[dim] += missing
    return [first.new_zeros(size), *(F.pad(matrix, padding) for matrix in matrices)]


@torch.library.custom_op("peft_moe_delta::grouped_product", mutates_args=())
def grouped_product(x_RI: Tensor, weights_OI: list[Tensor], ends_E: Tensor, unused_R1: Tensor) -> Tensor:
    """`x W^T` by rows of each expert; zeros in rows that are nobody's, which `grouped_mm` leaves as they come.

    Weights are stacked for it, and in the backward pass again: to keep the stack would keep every weight twice. It is
    an operator, as PyTorch compiles `grouped_mm` itself for bf16 alone.
    """
    product: Tensor = grouped_mm(x_RI, _stacked(weights_OI, x_RI.dtype).transpose(1, 2), offs=ends_E)
    return product.masked_fill_(unused_R1, 0)


@torch.library.custom_op("peft_moe_delta::grouped_product_backward", mutates_args=())
def grouped_product_backward(
    dy_RO: Tensor, x_RI: Tensor, weights_OI: list[Tensor], ends_E: Tensor, unused_R1: Tensor, of_x: bool, of_w: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_product`: (R, I) of the rows and (E, O, I) of the weights; empty where not asked for."""
    dx_RI, dw_EOI = x_RI.new_empty(0), x_RI.new_empty(0)
    if of_x:
        dx_RI = grouped_mm(dy_RO, _stacked(weights_OI, x_RI.dtype), offs=ends_E).masked_fill_(unused_R1, 0)
    if of_w:
        dw_EOI = grouped_mm(dy_RO.T, x_RI, offs=ends_E)
    return dx_RI, dw_EOI


@grouped_product.register_fake
def _(x_RI: Tensor, weights_OI: list[Tensor], ends_E: Tensor, unused_R1: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weights_OI[0].shape[0])


@grouped_product_backward.register_fake
def _(
    dy_RO: Tensor, x_RI: Tensor, weights_OI: list[Tensor], ends_E: Tensor, unused_R1: Tensor, of_x: bool, of_w: bool
) -> tuple[Tensor, Tensor]:
    of_weights = (len(weights_OI), *weights_OI[0].shape)
    return torch.empty_like(x_RI) if of_x else x_RI.new_empty(0), x_RI.new_empty(of_weights if of_w else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RI, weights_OI, ends_E, unused_R1 = inputs
    ctx.save_for_backward(x_RI, ends_E, unused_R1, *weights_OI)


def _gradients(ctx: Any, dy_RO: Tensor) -> tuple[Any, ...]:
    x_RI, ends_E, unused_R1, *weights_OI = ctx.saved_tensors
    of_x, of_each = ctx.needs_input_grad[:2]
    dx_RI, of_weights = _product_gradients(dy_RO, x_RI, weights_OI, ends_E, unused_R1, of_x, of_each)
    return dx_RI if of_x else None, of_weights, None, None


def _product_gradients(
    dy_RO: Tensor,
    x_RI: Tensor,
    weights_OI: Sequence[Tensor],
    ends_E: Tensor,
    unused_R1: Tensor,
    of_x: bool,
    of_each: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    dx_RI, dw_EOI = grouped_product_backward(
        dy_RO.contiguous(), x_RI, list(weights_OI), ends_E, unused_R1, of_x, any(of_each)
    )
    each = zip(weights_OI, dw_EOI.unbind(), of_each, strict=True) if any(of_each) else ()
    return dx_RI, [dw_OI.to(w_OI.dtype) if wanted else None for w_OI, dw_OI, wanted in each] or [None] * len(weights_OI)


@dataclass(frozen=True)
class _LastProduct:
    """The last map of all experts, as one that does not keep its input."""

    dtype: torch.dtype
    ends_E: Tensor
    unused_R1: Tensor

    def __call__(self, h_RF: Tensor, *weights: Tensor) -> Tensor:
        return _product(h_RF, weights, self.ends_E, self.unused_R1)

    def gradients(
        self, dy_RD: Tensor, h_RF: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        h_RF = h_RF.to(dy_RD.dtype)
        return _product_gradients(dy_RD, h_RF, weights, self.ends_E, self.unused_R1, True, wanted)


grouped_product.register_autograd(_gradients, setup_context=_keep)


def _stacked(weights_OI: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([weight.to(dtype) for weight in weights_OI])
