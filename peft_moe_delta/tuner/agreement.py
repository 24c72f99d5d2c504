"""Route agreement: do two models send the same tokens to the same experts?

In: two models with the same experts, and batches. Out: layer -> share of tokens whose set of chosen experts is the
same. It says what rounding a router to 16 bits changed (export against adapter), and what grafting did: the router was
fitted on the base model's hidden states and now sees the post-trained model's (DeltaMoE, arXiv 2605.18083).

Shape legend: T tokens, K chosen experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import GraftError
from ..export.gate import evaluating, random_batch
from ..routing import Routes
from .recording import recording


@torch.no_grad()
def route_agreement(first: nn.Module, second: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, float]:
    """Share of tokens with the same set of chosen experts, by layer.

    Args:
        first, second: adapters, or exports of one (stock or remote code); both in the plan's order of experts, so an
            export of all languages, not of one.
        batches: keyword arguments that both models take: `input_ids`, (batch, sequence), and where there is padding
            `attention_mask`.

    Returns:
        Layer -> share in [0, 1] over tokens that are not padding; layers in which a router has a say in both models.

    Raises:
        GraftError: no batch, or no layer in which both models route.
    """
    same: dict[int, int] = {}
    tokens = 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().reshape(-1).cpu()
        tokens += int(mask.sum())
        mine, other = _chosen(first, batch), _chosen(second, batch)
        for layer in mine.keys() & other.keys():
            agrees_T = same_experts(mine[layer], other[layer])
            same[layer] = same.get(layer, 0) + int(agrees_T[mask].sum())
    if not same or not tokens:
        raise GraftError(
            "There are no routes to compare: no batch was given, or the models have no layer in which both of their "
            "routers choose. Pass batches, and models with learned routing or several experts a group."
        )
    return {layer: same[layer] / tokens for layer in sorted(same)}


def mean_route_agreement(adapter: PeftModel, exported: PreTrainedModel, languages: int | None = None) -> float:
    """Share of random tokens that an export of all languages sends to the adapter's experts, averaged over layers."""
    return fmean(route_agreement(adapter, exported, [random_batch(exported, languages=languages)]).values())


def same_experts(first: Routes, second: Routes) -> Tensor:
    """Whether each token's set of chosen experts is the same, bool (T,): what agreement of routes means everywhere."""
    return (_sets(first) == _sets(second)).all(dim=-1)


def _sets(routes: Routes) -> Tensor:
    return routes.indices_TK.sort(dim=-1).values.cpu()


def _chosen(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[int, Routes]:
    """Layer -> routes of one pass."""
    device = next(model.parameters()).device
    with recording(model, forced=False) as recorded, evaluating(model):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return {layer: passes[-1] for layer, passes in recorded.items()}
