"""How a token chooses its experts.

In: router logits of a layer and, where the routing restricts them, the allowed experts of each token. Out: `Routes`.
A `Routing` answers one question: which experts may the languages of each group use in a layer?

Shape legend: T tokens, E experts, K chosen experts a token, G language groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Routes:
    """The choice of one layer for every token.

    Attributes:
        indices_TK: chosen experts by falling weight, int64. E marks a slot that is not used because the token may use
            fewer than K experts.
        weights_TK: their weights, fp32, summing to 1 over a token if `normalised`; 0 in unused slots.
        probabilities_TE: softmax over the experts the token may use, fp32; 0 for the others.
        normalised: whether a token's weights sum to 1.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    probabilities_TE: Tensor
    normalised: bool = True


class Routing(ABC):
    """Which experts a group's tokens may use. Implementations have no state: they are rules."""

    name: str
    needs_language: bool
    """Whether a forward pass without languages is an error."""

    @abstractmethod
    def allowed_experts(self, counts: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
        """The rule for a layer in which group g owns `counts[g]` experts: a (G, E) table of booleans.

        Expert 0 belongs to group 0; the experts of group 1 follow, and so on.
        """


def router_logits(x_TD: Tensor, rows: Tensor) -> Tensor:
    """`W_r x`, (T, E), in fp32 whatever the model's dtype and whatever autocast would do."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), rows.float())


def choose_experts(
    logits_TE: Tensor, top_k: int, allowed_TE: Tensor | None = None, *, renormalise: bool = True
) -> Routes:
    """`p_t = softmax(logits_t)` over the allowed experts, then the top k, renormalised to sum 1.

    Renormalising also at k = 1 makes a layer of equal experts compute exactly what one of them computes, at every k.

    Args:
        logits_TE: router logits, fp32.
        top_k: experts a token; a token that may use fewer uses all of those.
        allowed_TE: bool, at least one True a row; None where every token may use every expert.
        renormalise: False keeps the probabilities themselves as weights (BAM), whose sum is below 1.
    """
    num_experts = logits_TE.shape[-1]
    if allowed_TE is not None:
        logits_TE = logits_TE.masked_fill(~allowed_TE, -torch.inf)
    probabilities_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    chosen_TK, indices_TK = probabilities_TE.topk(min(top_k, num_experts), dim=-1)
    weights_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True) if renormalise else chosen_TK
    if allowed_TE is not None:
        unused_TK = ~allowed_TE.gather(1, indices_TK)
        indices_TK = indices_TK.masked_fill(unused_TK, num_experts)
    return Routes(indices_TK, weights_TK, probabilities_TE, renormalise)
