"""The auxiliary losses of a router, as pure functions.

In: router logits or probabilities of one layer. Out: a scalar tensor (fp32) and the number of tokens it speaks for.
Returned sums and counts let the caller average over the tokens of a pass; `share_of_step` then makes micro-batches add
up (see `tuner/context.py`).

Shape legend: T tokens, E experts, K chosen experts a token, S sets of allowed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
"""The label of a token that is no target."""


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


def language_prior_loss(*, logits_TE: Tensor, targets_TE: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
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
        The sum over counted tokens (0 where there are none, never NaN) and their number, both fp32 scalars.
    """
    counted_T = counted_T & targets_TE.any(dim=-1)
    logits_TE = logits_TE.float()
    target_T = logits_TE.masked_fill(~targets_TE, -torch.inf).where(counted_T[:, None], 0.0).logsumexp(dim=-1)
    loss_T = (logits_TE.logsumexp(dim=-1) - target_T).where(counted_T, 0.0)
    return loss_T.sum(), counted_T.sum().float()


def load_balancing_loss(
    *, probabilities_TE: Tensor, indices_TK: Tensor, sets_T: Tensor, allowed_SE: Tensor, counted_T: Tensor
) -> tuple[Tensor, Tensor]:
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
        `sum_s n_s L_s` and `sum_s n_s`, with n_s the counted tokens of set s: their ratio is the token-weighted mean.
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
    share_SE = choices_SE / choices_SE.sum(dim=-1, keepdim=True).clamp(min=1.0)

    summed_SE = weight_T.new_zeros(num_sets, num_experts)
    summed_SE = summed_SE.index_add(0, sets_T, probabilities_TE.float() * weight_T[:, None])
    # n_s P_e is the plain sum, so n_s L_s needs no division
    return (allowed_SE.sum(dim=-1) * (share_SE * summed_SE).sum(dim=-1)).sum(), tokens_S.sum()


def classifier_loss(*, logits_T: Tensor, original_T: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a layer's gate: is a token of an original language? (LayerMoE, arXiv 2505.22582)

    Where both answers occur, each weighs half, however much text there is of each: 0 is then the threshold at which
    the gate errs as often on one side as on the other, whatever a review's mix. With one original language among
    five, the plain sum would give away original tokens for the sake of the others.

    Args:
        logits_T: the gate's logits, fp32; above 0 for "original".
        original_T: bool, the truth.
        counted_T: bool, False for padding.

    Returns:
        The weighted sum over counted tokens and their number, both fp32 scalars.
    """
    loss_T = F.binary_cross_entropy_with_logits(logits_T.float(), original_T.float(), reduction="none")
    tokens, original = counted_T.sum().float(), (original_T & counted_T).sum().float()
    mixed = (original > 0) & (original < tokens)
    half_T = tokens / 2 / torch.where(original_T, original, tokens - original).clamp(min=1)
    return (loss_T * torch.where(mixed, half_T, 1.0)).where(counted_T, 0.0).sum(), tokens


def router_z_loss(*, logits_TE: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_t logsumexp(logits_t)^2`, which keeps logits small (ST-MoE, arXiv 2202.08906; BAM, arXiv 2408.08274).

    Args:
        logits_TE: router logits, fp32.
        counted_T: bool, False for padding.

    Returns:
        The sum over counted tokens and their number, both fp32 scalars.
    """
    return logits_TE.logsumexp(dim=-1).square().where(counted_T, 0.0).sum(), counted_T.sum().float()
