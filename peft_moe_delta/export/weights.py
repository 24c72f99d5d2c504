"""What is exported, whatever it was made from.

In: a dense model's config and tensors, and callables for its experts and routers. Out: one object that layouts read,
one expert at a time. Nothing here knows PEFT or computes anything: low-rank experts and grafts arrive as full tensors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..architectures import attention_module_name, mlp_module_name
from ..errors import GraftError
from ..languages import LanguageTable
from ..plan import ExpertPlan
from ..tensors import rounded


@dataclass(frozen=True)
class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are made each time they are asked for, so that only one of them need exist.

    Attributes:
        names: their names, in order.
        make: name -> tensor.
    """

    names: Iterable[str]
    make: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.make(name)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(tuple(self.names))


@dataclass(frozen=True)
class AttentionWeights:
    """The attention experts of an upcycled model: in its MoE layers, as many as there are MLP experts.

    Attributes:
        kind: `"full"` or `"shared_kv"`.
        experts: (layer, expert >= 1) -> the expert's tensors, named as inside the dense attention module; keys and
            values are the dense model's where they are shared.
        routers: layer -> router weight (E, d).
    """

    kind: str
    experts: Callable[[int, int], Mapping[str, Tensor]]
    routers: Callable[[int], Tensor]


@dataclass(frozen=True)
class IdentifierWeights:
    """What reads the languages from the text (`routing.context`).

    Attributes:
        scores: gives `score_l` of every token, (V, C) int8.
        vocabulary: V.
        memory: tokens that are remembered.
        threshold: evidence that a language needs.
        group_of: groups by what `recognise` says, (1 + C,).
    """

    scores: Callable[[], Tensor]
    vocabulary: int
    memory: int
    threshold: int
    group_of: tuple[int, ...]


@dataclass(frozen=True)
class UpcycledWeights:
    """An upcycled model as tensors; every token may use every expert that is exported, unless `languages` are given.

    Attributes:
        config: of the dense (post-trained) model.
        plan: experts per layer and group.
        top_k: experts a token may be sent to.
        dense: the dense model's state dict, in its own names; its MLPs are expert 0.
        experts: (layer, expert >= 1) -> the expert's tensors, named as inside the dense MLP (`gate_proj.weight`).
        routers: layer -> router weight (E, d), rows in the plan's order, for layers with more than one expert.
        renormalise: whether the weights of a token's experts are made to sum to 1.
        classifiers: layer -> what gives the rows (S, d + 1) of the gate before its router, where there is one.
        attention: the attention experts; None where there are none.
        group: None for the whole model under learned routing; else the one group that is exported (`for_group`).
        languages: for the whole model under routing by language, its languages and groups; None otherwise.
        identifier: what reads the languages from the text where none are named; None where nothing does.
        replicated: whether a layer with one expert is exported as equal copies of it (`with_dense_layers_replicated`).
    """

    config: PretrainedConfig
    plan: ExpertPlan
    top_k: int
    dense: Mapping[str, Tensor]
    experts: Callable[[int, int], Mapping[str, Tensor]]
    routers: Callable[[int], Tensor]
    renormalise: bool = True
    classifiers: Mapping[int, Callable[[], Tensor]] = field(default_factory=dict)
    attention: AttentionWeights | None = None
    group: str | None = None
    languages: LanguageTable | None = None
    identifier: IdentifierWeights | None = None
    replicated: bool = False

    def for_group(self, group: str) -> UpcycledWeights:
        """What a group's languages run on under routing by language: its experts, expert 0 in layers where it has none.

        With at most one expert a layer that is a dense model, else a smaller mixture of experts.

        Raises:
            GraftError: the plan has no such group.
        """
        if group not in self.plan.groups:
            raise GraftError(f"Cannot export group {group!r}: the plan has {', '.join(self.plan.groups)}. Choose one.")
        share = dataclasses.replace(self, group=group, languages=None, identifier=None)
        if self.attention is None:
            return share
        # Where one expert is left there is no mixture: its attention is the layer's own.
        share = dataclasses.replace(
            share, dense=LazyTensors(tuple(self.dense), share._with_attention_of_one(self.dense))
        )
        return share if share.moe_layers else dataclasses.replace(share, attention=None)

    def _with_attention_of_one(self, dense: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        """The dense weights, with the attention of the expert that is left in a layer."""
        attention = self.attention
        places: dict[str, tuple[int, int, str]] = {}
        assert attention is not None
        for layer, names in _names_inside(dense, attention_module_name(self.config.model_type)).items():
            if layer in self.plan.layers and len(chosen := self.selected(layer)) == 1 and chosen != (0,):
                places |= {name: (layer, chosen[0], inner) for inner, name in names.items()}

        def tensor(name: str) -> Tensor:
            if name not in places:
                return dense[name]
            layer, expert, inner = places[name]
            return rounded(attention.experts(layer, expert)[inner], dense[name].dtype, name)

        return tensor

    def with_dense_layers_replicated(self) -> UpcycledWeights:
        """The same model for an architecture whose layers are all MoE: equal experts give equal outputs, so a layer
        with one expert may have as many copies of it as the others have experts."""
        return dataclasses.replace(self, replicated=True)

    def selected(self, layer: int) -> tuple[int, ...]:
        """The plan's indices of the experts that are exported in a layer, in order."""
        chosen = self._chosen(layer)
        if self.replicated and len(chosen) == 1:
            return chosen * max(len(self._chosen(other)) for other in self.plan.layers)
        return chosen

    def _chosen(self, layer: int) -> tuple[int, ...]:
        """The plan's indices of a layer's experts, before any is replicated."""
        if self.group is None:
            return tuple(range(self.plan.num_experts(layer)))
        return tuple(self.plan.experts_of(layer, self.group)) or (0,)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that are exported with more than one expert."""
        return tuple(layer for layer in range(self.config.num_hidden_layers) if len(self.selected(layer)) > 1)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers that are exported with one expert."""
        return tuple(layer for layer in range(self.config.num_hidden_layers) if layer not in self.moe_layers)

    @property
    def replicated_bytes(self) -> int:
        """What copies of the layers with one expert cost, or would cost, in the exported dtype."""
        experts = max(len(self._chosen(layer)) for layer in self.plan.layers)
        single = [layer for layer in range(self.config.num_hidden_layers) if len(self._chosen(layer)) == 1]
        sizes = {layer: sum(math.prod(self.shape(name)) for name in self.mlp_names[layer].values()) for layer in single}
        routers = len(single) * experts * self.config.hidden_size
        return ((experts - 1) * sum(sizes.values()) + routers) * self.dtype.itemsize

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor, from the file's header where `dense` is a reader of files."""
        return tuple(getattr(self.dense, "shapes", {}).get(name) or self.dense[name].shape)

    @property
    def num_experts(self) -> int:
        """Experts of a MoE layer, in weights whose MoE layers all have the same number."""
        return len(self.selected(self.moe_layers[0]))

    @property
    def num_experts_per_token(self) -> int:
        """k, at most `num_experts`."""
        return min(self.top_k, self.num_experts)

    @cached_property
    def mlp_names(self) -> Mapping[int, Mapping[str, str]]:
        """Layer -> {name inside the MLP: name in `dense`}."""
        return _names_inside(self.dense, mlp_module_name(self.config.model_type))

    @cached_property
    def attention_names(self) -> Mapping[int, Mapping[str, str]]:
        """Layer -> {name inside the attention module: name in `dense`}, where attention experts are exported."""
        if self.attention is None:
            return {}
        return _names_inside(self.dense, attention_module_name(self.config.model_type))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense MLPs, which the exported model has throughout."""
        return self._dense_mlp.dtype

    @property
    def device(self) -> torch.device:
        """The device of the dense MLPs, which the exported model is built on."""
        return self._dense_mlp.device

    @property
    def _dense_mlp(self) -> Tensor:
        return self.dense[next(name for names in self.mlp_names.values() for name in names.values())]

    def expert(self, layer: int, position: int) -> Mapping[str, Tensor]:
        """Tensors of the expert at a position of `selected(layer)`, named as inside the dense MLP, in `dtype`."""
        expert = self.selected(layer)[position]
        if expert == 0:
            return LazyTensors(self.mlp_names[layer], lambda matrix: self.dense[self.mlp_names[layer][matrix]])
        tensors = self.experts(layer, expert)
        return LazyTensors(tensors, lambda name: self._rounded(tensors, name, f"expert {expert} of layer {layer}"))

    def attention_expert(self, layer: int, position: int) -> Mapping[str, Tensor]:
        """As `expert`, of a layer's attention."""
        assert self.attention is not None
        names, expert = self.attention_names[layer], self.selected(layer)[position]
        if expert == 0:
            return LazyTensors(names, lambda name: self.dense[names[name]])
        tensors = self.attention.experts(layer, expert)
        owner = f"attention expert {expert} of layer {layer}"
        return LazyTensors(names, lambda name: self._rounded(tensors, name, owner))

    def router(self, layer: int) -> Tensor:
        """Router rows of the selected experts, (E, d), in `dtype`: stock architectures keep no fp32 router."""
        if len(self._chosen(layer)) == 1:  # between equal experts any router will do
            return torch.zeros(len(self.selected(layer)), self.config.hidden_size, dtype=self.dtype)
        return rounded(self.routers(layer)[list(self.selected(layer))], self.dtype, f"The router of layer {layer}")

    def _rounded(self, tensors: Mapping[str, Tensor], name: str, owner: str) -> Tensor:
        return rounded(tensors[name], self.dtype, f"{name} of {owner}")


def _names_inside(dense: Iterable[str], module: str) -> dict[int, dict[str, str]]:
    """Layer -> {name inside a module of the decoder layer: whole name}."""
    pattern = re.compile(rf"(?:.*?\.)?(\d+)\.{re.escape(module)}\.(.+)")
    names: dict[int, dict[str, str]] = {}
    for name in dense:
        if match := pattern.fullmatch(name):
            names.setdefault(int(match[1]), {})[match[2]] = name
    return names
