"""The auxiliary losses of a router, as pure functions.

In: router logits or probabilities of one layer. Out: a `SummedLoss`, sums over tokens (fp32), so that the caller can
average over the tokens of a pass, on several processes over those of all; `share_of_step` then makes micro-batches add
up (see `tuner/passes.py`).

Shape legend: T tokens, E experts, K chosen experts a token, S sets of allowed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
"""The label of a token that is no target."""


def _plain(counts: Tensor) -> Tensor:
    return counts.new_ones(())


class SummedLoss(NamedTuple):
    """A loss of some tokens as sums over them, of which those of other tokens can be added.

    Attributes:
        parts: (P,) or any other shape, fp32, with the gradient.
        tokens: how many tokens it speaks for, an fp32 scalar.
        counts: what the weights of the parts depend on, fp32, without gradient; empty where they are 1.
        weigh: counts, of these tokens or of more, -> the parts' weights.
    """

    parts: Tensor
    tokens: Tensor
    counts: Tensor
    weigh: Callable[[Tensor], Tensor] = _plain

    def total(self, counts: Tensor | None = None) -> Tensor:
        """The sum over these tokens, a scalar; `counts` are those of all tokens that the mean is of, None for these."""
        return (self.parts * self.weigh(self.counts if counts is None else counts)).sum()


def share_of_step(inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Tensor | float:
    """How much of an optimizer step one forward pass is: its targets over those of all passes of the step.

    Trainer accumulates gradients over several passes (micro-batches, processes) and tells each one number, the targets
    of them all, by which the model divides the sum of its next-token losses. So a pass weighs there by its targets, and
    it weighs the same here. Shares add up to 1, and what is a mean over a pass becomes a mean over the step whatever is
    masked: exactly that of the joint batch where the passes have as many targets to a token, else one that leans
    towards the passes that teach the model more. (The tokens of the whole step would be the better weight; nobody
    tells them to a pass.)

    Args:
        inputs: the pass's arguments, of which `labels` (next token's, to be shifted) or `shift_labels` are read.
        num_items: targets in the whole step, Trainer's `num_items_in_batch`; None where the pass is all of it, or
            where the caller averages over passes.

    Returns:
        A number in [0, 1], 0 for a pass without targets. 1 where nobody says.
    """
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    targets = labels[..., 1:] if shifted is None and isinstance(labels, Tensor) else shifted
    if num_items is None or not isinstance(targets, Tensor):
        return 1.0
    # A step without any target has shares of 0, where 0 / 0 would turn the routers into NaN.
    return (targets != IGNORED_LABEL).sum() / torch.as_tensor(num_items, device=targets.device).clamp(min=1)


def language_prior_loss(*, logits_TE: Tensor, targets_TE: Tensor, counted_T: Tensor) -> SummedLoss:
    """Cross-entropy of the router towards a set of experts, on the unrestricted softmax.

    `L = - sum_t log sum_{e in target(t)} softmax(logits_t)_e`. With target {0} on original-language tokens this is the
    LPR loss of MoE-LPR (arXiv 2408.11396); with a group's own experts, the router classification of DMoE
    (arXiv 2506.12388). The softmax is applied once: MoE-LPR's published code applies it twice, which bounds the loss
    and starves badly routed tokens of gradient.

    Args:
        logits_TE: router logits, fp32.
        targets_TE: bool, the experts a token should go to. A token without any target is not counted.
        counted_T: bool, False for padding.

    Returns:
        The sum over counted tokens (0 where there are none, never NaN).
    """
    counted_T = counted_T & targets_TE.any(dim=-1)
    logits_TE = logits_TE.float()
    target_T = logits_TE.masked_fill(~targets_TE, -torch.inf).where(counted_T[:, None], 0.0).logsumexp(dim=-1)
    loss_T = (logits_TE.logsumexp(dim=-1) - target_T).where(counted_T, 0.0)
    return _additive(loss_T, counted_T)


def load_balancing_loss(
    *, probabilities_TE: Tensor, indices_TK: Tensor, sets_T: Tensor, allowed_SE: Tensor, counted_T: Tensor
) -> SummedLoss:
    """Load balancing within each set of allowed experts: `L_s = |A_s| sum_{e in A_s} f_e P_e`, 1 at balance.

    `f_e` is the share of the set's (token, rank) choices that went to expert e, `P_e` its mean router probability
    (Switch / MoE-LPR; the published code sums over ranks, so that its balanced value is k). Where a token uses every
    expert of its set, that share would be the same whatever the router says, and so would the loss: there first choices
    alone are counted. Sets with one expert have nothing to balance and are left out. Only `P_e` carries a gradient.

    Args:
        probabilities_TE: softmax over the allowed experts, fp32.
        indices_TK: chosen experts; an entry of E is an unused slot.
        sets_T: the set each token chose from, an index into `allowed_SE`.
        allowed_SE: bool, the experts in each set.
        counted_T: bool, False for padding.

    Returns:
        `sum_s n_s L_s` over `sum_s n_s` tokens, with n_s the counted tokens of set s: their ratio is the token-weighted
        mean. Parts (S, E) are `|A_s| sum_t P_te`, counts (S, E) the choices of which `f_e` is the share.
    """
    num_sets, num_experts = allowed_SE.shape
    size_T = allowed_SE.sum(dim=-1)[sets_T]
    counted_T = counted_T & (size_T > 1)
    weight_T = counted_T.float()
    tokens_S = weight_T.new_zeros(num_sets).index_add_(0, sets_T, weight_T)

    ranks_K = torch.arange(indices_TK.shape[1], device=indices_TK.device)
    uses_all_T = size_T <= indices_TK.shape[1]
    indices_TK = indices_TK.masked_fill(uses_all_T[:, None] & (ranks_K > 0), num_experts)
    chosen_TE = weight_T.new_zeros(len(sets_T), num_experts + 1)
    chosen_TE = chosen_TE.scatter_add_(1, indices_TK, torch.ones_like(indices_TK, dtype=torch.float32))[:, :num_experts]
    choices_SE = weight_T.new_zeros(num_sets, num_experts).index_add_(0, sets_T, chosen_TE * weight_T[:, None])

    summed_SE = weight_T.new_zeros(num_sets, num_experts)
    summed_SE = summed_SE.index_add(0, sets_T, probabilities_TE.float() * weight_T[:, None])
    # n_s P_e is the plain sum, so n_s L_s needs no division
    parts_SE = allowed_SE.sum(dim=-1, keepdim=True) * summed_SE
    return SummedLoss(parts_SE, tokens_S.sum(), choices_SE, _shares)


def _shares(choices_SE: Tensor) -> Tensor:
    return choices_SE / choices_SE.sum(dim=-1, keepdim=True).clamp(min=1.0)


def classifier_loss(*, logits_T: Tensor, original_T: Tensor, counted_T: Tensor) -> SummedLoss:
    """Cross-entropy of a layer's gate: is a token of an original language? (LayerMoE, arXiv 2505.22582)

    Where both answers occur, each weighs half, however much text there is of each: 0 is then the threshold at which
    the gate errs as often on one side as on the other, whatever a review's mix. With one original language among
    five, the plain sum would give away original tokens for the sake of the others.

    Args:
        logits_T: the gate's logits, fp32; above 0 for "original".
        original_T: bool, the truth.
        counted_T: bool, False for padding.

    Returns:
        The weighted sum over counted tokens. Parts (2,) and counts (2,) are of the original languages and of others.
    """
    loss_T = F.binary_cross_entropy_with_logits(logits_T.float(), original_T.float(), reduction="none")
    sides_2T = torch.stack([original_T & counted_T, ~original_T & counted_T])
    counts = sides_2T.sum(dim=-1).float()
    return SummedLoss(loss_T.where(sides_2T, 0.0).sum(dim=-1), counts.sum(), counts, _halves)


def _halves(counts: Tensor) -> Tensor:
    """Half of all tokens for each side, where there are two."""
    halves = counts.sum() / 2 / counts.clamp(min=1)
    return torch.where((counts > 0).all(), halves, 1.0)


def router_z_loss(*, logits_TE: Tensor, counted_T: Tensor) -> SummedLoss:
    """`sum_t logsumexp(logits_t)^2`, which keeps logits small (ST-MoE, arXiv 2202.08906; BAM, arXiv 2408.08274).

    Args:
        logits_TE: router logits, fp32.
        counted_T: bool, False for padding.

    Returns:
        The sum over counted tokens.
    """
    return _additive(logits_TE.logsumexp(dim=-1).square().where(counted_T, 0.0), counted_T)


def _additive(loss_T: Tensor, counted_T: Tensor) -> SummedLoss:
    return SummedLoss(loss_T.sum(), counted_T.sum().float(), loss_T.new_zeros(0))
