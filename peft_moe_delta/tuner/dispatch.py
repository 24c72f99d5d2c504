"""From choices to experts and back: rows of tokens sorted by expert, and what the experts say put in its place.

In: which experts every token goes to. Out: `Dispatch`, the slice of rows that each expert gets, and the weighted sum of
their outputs. Pure functions of tensors, which know no layer and no module.

Shape legend: T tokens, D hidden size, K chosen experts a token, C = T * K choices,
R rows: one for every choice that is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..routing import Routes


def constant(numbers: tuple[int, ...] | range, device: torch.device) -> Tensor:
    """Whole numbers as a tensor: copied to each device once, or part of a compiled graph."""
    return torch.tensor(numbers, device=device) if torch.compiler.is_compiling() else _kept_constant(numbers, device)


@lru_cache(maxsize=256)
def _kept_constant(numbers: tuple[int, ...] | range, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Dispatch:
    """Which rows go to which expert.

    Attributes:
        counts: rows of each expert, in the order of experts; they are cut one after another. Empty where only the
            device knows them.
        token_R: the token of each row; None where one expert takes all tokens as they are.
        choice_R: the choice, t * K + k, of each row; None as above.
        place: where the row of each choice is, (T * K,); None where some choice is not used, and as above.
        ends_E: int32, where the rows of each expert end; None where the host knows. Rows of choices that are not used
            come behind them all.
    """

    counts: tuple[int, ...]
    token_R: Tensor | None = None
    choice_R: Tensor | None = None
    place: Tensor | None = None
    ends_E: Tensor | None = None

    @classmethod
    def to_one(cls, expert: int, num_tokens: int) -> Dispatch:
        """Every token goes to one expert."""
        return cls((0,) * expert + (num_tokens,))

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, *, on_device: bool = False) -> Dispatch:
        """Sort the choices by expert, once; an index of `num_experts` is a choice that is not used.

        Args:
            on_device: whether the host shall not wait for the device to hear where the slices end.
        """
        chosen, order = indices_TK.reshape(-1).sort(stable=True)
        ends_E = torch.searchsorted(chosen, constant(range(1, num_experts + 1), chosen.device))
        top_k = indices_TK.shape[1]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        found = cls((), order if top_k == 1 else order // top_k, order, place, ends_E.int())
        return found if on_device else found.on_host()

    def on_host(self) -> Dispatch:
        """The same with `counts`, for which the host waits for the device."""
        if self.ends_E is None:
            return self
        assert self.token_R is not None and self.choice_R is not None
        ends = self.ends_E.tolist()
        counts = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        if ends[-1] == len(self.choice_R):
            return Dispatch(counts, self.token_R, self.choice_R, self.place)
        return Dispatch(counts, self.token_R[: ends[-1]], self.choice_R[: ends[-1]])

    def rows(self, x_TD: Tensor) -> dict[int, Tensor]:
        """The rows of every expert that has any, by its index."""
        used = {expert: count for expert, count in enumerate(self.counts) if count}
        x_RD = x_TD if self.token_R is None else x_TD.index_select(0, self.token_R)
        if len(used) < 2:
            return dict.fromkeys(used, x_RD)
        return dict(zip(used, x_RD.split(list(used.values())), strict=True))

    def combine(self, outputs: Sequence[Tensor], x_TD: Tensor, routes: Routes | None) -> Tensor:
        """The experts' rows, one after another, back in their places, and each token's weighted sum, (T, D).

        Args:
            outputs: of the experts that have rows, in the order of experts.
            x_TD: what the rows were taken from.
            routes: the weights; None where every token has one expert, whose weight is 1.
        """
        if not outputs:
            return x_TD  # no token, no output
        y_RD = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
        if self.choice_R is None:
            return y_RD
        num_choices = len(x_TD) if routes is None else routes.indices_TK.numel()
        if self.place is not None:
            y_CD = y_RD.index_select(0, self.place)
        else:
            y_CD = y_RD.new_zeros(num_choices, y_RD.shape[-1]).index_copy(0, self.choice_R, y_RD)
        if routes is None or not weighs(routes):
            return y_CD
        y_TKD = y_CD.view(*routes.indices_TK.shape, y_CD.shape[-1])
        return (y_TKD * routes.weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)


def weighs(routes: Routes) -> bool:
    """Whether weights matter: a single one that is normalised is 1."""
    return routes.indices_TK.shape[1] > 1 or not routes.normalised


class _NoPart(torch.autograd.Function):
    """Zero, in which parameters take part with a gradient of zero, however many, in one operation."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(p.shape, p.dtype, p.device) for p in parameters]
        return like.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)


def with_idle(y: Tensor, idle: Sequence[Tensor]) -> Tensor:
    """`y`, in whose backward pass idle parameters get a gradient of zero instead of none, as DDP waits for."""
    idle = [parameter for parameter in idle if parameter.requires_grad]
    if not idle:
        return y
    zero: Tensor = _NoPart.apply(y, *idle)
    return y + zero
