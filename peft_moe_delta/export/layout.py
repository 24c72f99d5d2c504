"""The one write loop, and what a stock architecture has to say to use it.

In: `UpcycledWeights`. Out: a config and a stream of (on-disk name, tensor), one expert at a time, so that building a
model in memory and writing files in bounded memory read the same loop. A stock architecture is a `MoeLayout`: a name
map, its config fields and the reasons for which a model does not fit; `mixtral.py` is the shortest.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ..engines import DENSE
from .names import DenseNames
from .weights import UpcycledWeights

SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "rope_parameters",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Config fields that dense and MoE architectures share, name and meaning."""

ROW_BYTES = 16
"""What transformers' grouped matrix product, its default for experts, asks of a row."""

SAME_EXPERT_NAMES: Mapping[str, str] = {
    f"{matrix}.weight": f"mlp.experts.{{}}.{matrix}.weight" for matrix in ("gate_proj", "up_proj", "down_proj")
}
"""`MoeLayout.expert_names` of the architectures that call an expert's matrices what Llama calls the MLP's."""

_HEAD = "lm_head.weight"


class Layout:
    """The dense architecture itself, for weights without MoE layers; what the others add is in `MoeLayout`."""

    replicates: ClassVar[bool] = False
    """Whether layers with one expert are written with copies of it."""

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return DENSE

    def model_class(self, weights: UpcycledWeights) -> type[PreTrainedModel]:
        """The exported model's class."""
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config(weights))]
        model_class: type[PreTrainedModel] = found
        return model_class

    def files(self, weights: UpcycledWeights) -> Mapping[str, str]:
        """Name -> text of what lies beside config and weights."""
        return {}

    def config(self, weights: UpcycledWeights) -> PretrainedConfig:
        """The exported model's config."""
        config = copy.deepcopy(weights.config)
        config.dtype = weights.dtype
        add_legacy_rope(config)
        return config

    def tensors(self, weights: UpcycledWeights) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its on-disk name; a layer's experts come together, and a tied embedding once."""
        on_disk = self.on_disk(weights)
        for name, tensor in self._parts(weights):
            yield on_disk(name), tensor

    def on_disk(self, weights: UpcycledWeights) -> Callable[[str], str]:
        """What `save_pretrained` of the architecture calls the tensors that the methods below name."""
        return DenseNames(weights.config).on_disk

    def _parts(self, weights: UpcycledWeights) -> Iterator[tuple[str, Tensor]]:
        layer_of = {name: layer for layer, names in weights.mlp_names.items() for name in names.values()}
        written: set[int] = set()
        for name in weights.dense:
            layer = layer_of.get(name)
            if layer is None:
                if not (name == _HEAD and weights.config.tie_word_embeddings):
                    yield from self.outside_mlp(weights, name)
            elif layer not in written:
                written.add(layer)
                yield from self.mlp(weights, layer)

    def outside_mlp(self, weights: UpcycledWeights, name: str) -> Iterator[tuple[str, Tensor]]:
        """One tensor that belongs to no MLP."""
        yield name, weights.dense[name]

    def mlp(self, weights: UpcycledWeights, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The MLP of one layer."""
        for matrix, tensor in weights.expert(layer, 0).items():
            yield weights.mlp_names[layer][matrix], tensor


class ReplicatedLayout(Layout):
    """An architecture whose layers are all MoE, with equal experts in the layers that have one."""

    replicates = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def name(self) -> str:
        return self.layout.name

    def config(self, weights: UpcycledWeights) -> PretrainedConfig:
        return self.layout.config(weights.with_dense_layers_replicated())

    def tensors(self, weights: UpcycledWeights) -> Iterator[tuple[str, Tensor]]:
        yield from self.layout.tensors(weights.with_dense_layers_replicated())


class MoeLayout(Layout, ABC):
    """A stock MoE architecture for dense models with Llama's names (`model.layers.N.mlp.gate_proj.weight`)."""

    dense_types: ClassVar[tuple[str, ...]]
    """`model_type` of the dense models whose attention, norms and embeddings it shares."""
    config_class: ClassVar[type[PretrainedConfig]]
    router_name: ClassVar[str]
    """The router's name inside a decoder layer."""
    expert_names: ClassVar[Mapping[str, str]]
    """Name inside the dense MLP -> name inside a decoder layer, `{}` standing for the expert's number."""
    keeps_dense_layers: ClassVar[bool] = False
    """Whether some of its layers may have an ordinary MLP."""

    @property
    def name(self) -> str:
        """The architecture's `model_type`."""
        return self.config_class.model_type

    @abstractmethod
    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        """Config fields beyond `SAME_FIELDS`."""

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        """Why the weights cannot be held exactly, one reason at a time; none if they can."""
        counts = [len(weights.selected(layer)) for layer in weights.moe_layers]
        if len(set(counts)) > 1:
            yield f"its MoE layers all have one number of experts, these have {counts}"
        if weights.dense_layers and not self.keeps_dense_layers:
            yield (
                f"all its layers are MoE, here the layers {list(weights.dense_layers)} have one expert "
                f"(replicate_dense_layers=True would write copies of it, {weights.replicated_bytes:,} bytes more)"
            )
        unknown = {matrix for names in weights.mlp_names.values() for matrix in names} - self.dense_names
        if unknown:
            yield f"its experts have no {', '.join(sorted(unknown))}"
        sizes = weights.config.hidden_size, weights.config.intermediate_size
        if any(size * weights.dtype.itemsize % ROW_BYTES for size in sizes):
            yield f"its experts need rows of a multiple of {ROW_BYTES} bytes; here sizes {sizes} in {weights.dtype}"

    def on_disk(self, weights: UpcycledWeights) -> Callable[[str], str]:
        return str  # they are the disk's names

    @property
    def dense_names(self) -> frozenset[str]:
        """The names inside the dense MLP that it knows."""
        return frozenset(self.expert_names)

    def expert(self, weights: UpcycledWeights, layer: int, position: int) -> Mapping[str, Tensor]:
        """One expert's tensors under the names of `expert_names`."""
        return weights.expert(layer, position)

    def config(self, weights: UpcycledWeights) -> PretrainedConfig:
        fields = {field: copy.deepcopy(getattr(weights.config, field)) for field in SAME_FIELDS}
        fields |= {"output_router_logits": False, "router_aux_loss_coef": 0.0, "dtype": weights.dtype}
        config = self.config_class(**(fields | self.fields(weights)))
        add_legacy_rope(config)
        return config

    def mlp(self, weights: UpcycledWeights, layer: int) -> Iterator[tuple[str, Tensor]]:
        if layer not in weights.moe_layers:
            yield from super().mlp(weights, layer)
            return
        prefix = f"model.layers.{layer}."
        yield prefix + self.router_name, weights.router(layer)
        for position in range(len(weights.selected(layer))):
            for matrix, tensor in self.expert(weights, layer, position).items():
                yield prefix + self.expert_names[matrix].format(position), tensor


def add_legacy_rope(config: PretrainedConfig) -> None:
    """Write `rope_theta` and `rope_scaling` beside `rope_parameters`, or transformers 4 reads default positions.

    `rope_scaling` goes into the instance's dictionary, which is what is serialised: transformers 5 has a property of
    that name, whose setter would replace `rope_parameters`.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:  # no rotary positions, or one set of them for each layer type
        return
    config.rope_theta = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        vars(config)["rope_scaling"] = rope


def given_head_width(weights: UpcycledWeights) -> dict[str, int]:
    """`head_dim`, for architectures that read it where a config has it, though it is no field of theirs."""
    width = getattr(weights.config, "head_dim", None)
    return {} if width is None else {"head_dim": width}
