"""Route agreement: do two models send the same tokens to the same experts?

In: two models with the same experts, and batches. Out: layer -> share of tokens whose set of chosen experts is the
same. It says what rounding a router to 16 bits changed (export against adapter), and what grafting did: the router was
fitted on the base model's hidden states and now sees the post-trained model's (DeltaMoE, arXiv 2605.18083).

Shape legend: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import layer_index
from ..errors import GraftError
from ..export.gate import evaluating, random_batch
from ..routing import choose_experts
from .context import constant
from .layer import MoeDeltaLayer

Routed = dict[int, Tensor]
"""Layer -> chosen experts of one pass, (T, K), ascending."""


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
        mine, other = _routes(first, batch), _routes(second, batch)
        for layer in mine.keys() & other.keys():
            agrees_T = (mine[layer] == other[layer]).all(dim=-1)
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


def _routes(model: nn.Module, batch: Mapping[str, Tensor]) -> Routed:
    device = next(model.parameters()).device
    with _recording(model) as routed, evaluating(model):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return routed


@contextmanager
def _recording(model: nn.Module) -> Iterator[Routed]:
    """Note what every router of a model chooses."""
    routed: Routed = {}
    handles = []
    for name, module in model.named_modules():
        for router, chosen in _routers(module):

            def note(_: Any, inputs: Any, output: Any, layer: int = layer_index(name), chosen: Any = chosen) -> None:
                routed[layer] = chosen(inputs[0], output).sort(dim=-1).values.cpu()

            handles.append(router.register_forward_hook(note))
    try:
        yield routed
    finally:
        for handle in handles:
            handle.remove()


def _routers(module: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Any, Any], Tensor]]]:
    """A router that a module is or owns, and how to read its choice, (T, K), from its input and output."""
    if isinstance(module, MoeDeltaLayer):
        name = next((adapter for adapter in module.active_adapters if adapter in module.settings), None)
        if name is not None:
            yield module.router(name), lambda x_TD, logits_TE: _chosen_by(module, name, x_TD, logits_TE)
    elif hasattr(module, "groups_T"):  # remote code

        def chosen(_: Tensor, logits_TE: Tensor) -> Tensor:
            mixture: Any = module
            allowed_TE = None
            if mixture.allowed is not None:
                allowed_TE = torch.tensor(mixture.allowed, device=logits_TE.device)[mixture.groups_T]
            return choose_experts(logits_TE, mixture.top_k, allowed_TE).indices_TK

        yield module.get_submodule("router"), chosen
    elif type(module).__name__.endswith("TopKRouter"):  # transformers': logits, weights and indices in a tuple
        yield module, lambda _, output: next(part for part in output if not part.is_floating_point())


def _chosen_by(layer: MoeDeltaLayer, name: str, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
    settings = layer.settings[name]
    groups = layer.context.state(len(x_TD), False).groups(settings.table, x_TD.device)
    sets_T, allowed = layer._sets(settings, groups, x_TD, name)
    allowed_TE = None if sets_T is None else constant(allowed, x_TD.device)[sets_T]
    return choose_experts(logits_TE, settings.config.experts_per_token, allowed_TE).indices_TK
