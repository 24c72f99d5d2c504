"""Routing with a classifier (LayerMoE, arXiv 2505.22582): original-language tokens stay on expert 0 in some layers.

On the layers where languages look most alike, a gate before the router recognises the tokens of original languages and
sends them to expert 0 alone; all other tokens, and all tokens on the remaining layers, are routed as learned.

The published gate reads the sum over the whole sequence, so a token's class depends on later tokens and on padding, and
changes while decoding. Ours reads the token's own hidden state, which already holds what came before it: the same in
one pass, in any batch, and token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import PlanError
from .learned import LearnedRouting


class ClassifierRouting(LearnedRouting):
    """All experts for every token that the gate of its layer lets through; layers without a gate have it so for all."""

    name = "classifier"


def classifier_logits(x_TD: Tensor, rows: Tensor) -> Tensor:
    """`W x + b`, (T, S), in fp32: one logit a growth step, above 0 for "original"; `rows` is (S, D + 1), b last."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), rows[:, :-1].float(), rows[:, -1].float())


def recognised(logits_TS: Tensor) -> Tensor:
    """(T,) booleans: all steps agree that a token is of an original language."""
    return logits_TS.amin(dim=-1) > 0


def most_similar_layers(
    similarity: Sequence[float], *, count: int | None = None, threshold: float | None = None
) -> list[int]:
    """The layers to put classifiers on: the `count` most similar ones, or those of at least `threshold`.

    Args:
        similarity: cross-lingual similarity of each layer, in the order of layers.
        count: how many.
        threshold: from which similarity on.

    Returns:
        Positions in `similarity`, ascending.

    Raises:
        PlanError: neither or both of the two, or no layer is left.
    """
    if (count is None) == (threshold is None):
        raise PlanError(f"Give either count or threshold; got count={count!r} and threshold={threshold!r}.")
    if threshold is not None:
        found = [layer for layer, value in enumerate(similarity) if value >= threshold]
    else:
        found = sorted(sorted(range(len(similarity)), key=lambda layer: -similarity[layer])[: max(0, count or 0)])
    if not found or (count is not None and count > len(similarity)):
        raise PlanError(
            f"count={count!r}, threshold={threshold!r} chooses {len(found)} of {len(similarity)} layers, whose "
            f"similarities go up to {max(similarity, default=None)}. Choose at least one, and no more than there are."
        )
    return found
