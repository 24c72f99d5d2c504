"""Pico upcycled models with random experts, and what they compute, token by token."""

import copy
import functools

import torch

from peft_moe_delta.export import UpcycledWeights
from peft_moe_delta.plan import ExpertPlan


def plan_of(counts, layers=(0, 1, 2), groups=("original", "expanded")):
    """A plan from its rows, one a layer."""
    return ExpertPlan(tuple(layers), tuple(groups), tuple(map(tuple, counts)))


def upcycle(model, plan, top_k=2, seed=1):
    """A dense model's weights with random experts and routers."""
    generator = torch.Generator().manual_seed(seed)
    experts, routers = {}, {}
    for layer in plan.layers:
        routers[layer] = torch.randn(plan.num_experts(layer), model.config.hidden_size, generator=generator)
        for expert in range(1, plan.num_experts(layer)):
            experts[layer, expert] = {
                name: weight + weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
                for name, weight in model.get_submodule(f"model.layers.{layer}.mlp").state_dict().items()
            }
    return UpcycledWeights(
        config=model.config,
        plan=plan,
        top_k=top_k,
        dense=model.state_dict(),
        experts=lambda layer, expert: experts[layer, expert],
        routers=lambda layer: routers[layer],
    )


class Mixture(torch.nn.Module):
    """What the weights mean: the dense model, its MLPs replaced by an explicit loop over tokens and chosen experts.

    `selected` (layer -> experts a token may use) is every expert unless given, as under hard routing.
    """

    def __init__(self, model, weights, selected=None, renormalise=True):
        super().__init__()
        self.model, self.weights, self.renormalise = model, weights, renormalise
        self.selected = selected or {layer: range(weights.plan.num_experts(layer)) for layer in weights.plan.layers}
        self.experts = {layer: [self.expert(layer, e) for e in chosen] for layer, chosen in self.selected.items()}

    def expert(self, layer, expert):
        module = copy.deepcopy(self.model.model.layers[layer].mlp)
        if expert:
            module.load_state_dict(self.weights.experts(layer, expert))
        return module

    def mixed(self, layer, hidden):
        router, experts = self.weights.routers(layer)[list(self.selected[layer])], self.experts[layer]
        output = torch.zeros_like(hidden)
        for place in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])).tolist():
            token = hidden[tuple(place)]
            top = (router @ token).softmax(0).topk(min(self.weights.top_k, len(experts)))
            shares = top.values / top.values.sum() if self.renormalise else top.values
            output[tuple(place)] = sum(
                share * experts[index](token) for share, index in zip(shares, top.indices.tolist(), strict=True)
            )
        return output

    @torch.no_grad()
    def forward(self, **batch):
        mlps = {layer: self.model.model.layers[layer].mlp for layer in self.selected}
        for layer, mlp in mlps.items():
            mlp.forward = functools.partial(self.mixed, layer)
        try:
            return self.model(**batch)
        finally:
            for mlp in mlps.values():
                del mlp.forward
