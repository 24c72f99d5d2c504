"""Mixtral, for Llama, Mistral and Phi-3 models whose layers are all MoE. It always renormalises the top-k weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import MixtralConfig, PretrainedConfig

from .layout import MoeLayout
from .weights import UpcycledWeights


class MixtralLayout(MoeLayout):
    dense_types: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    config_class = MixtralConfig
    router_name = "block_sparse_moe.gate.weight"
    expert_names: ClassVar = {
        "gate_proj.weight": "block_sparse_moe.experts.{}.w1.weight",
        "up_proj.weight": "block_sparse_moe.experts.{}.w3.weight",
        "down_proj.weight": "block_sparse_moe.experts.{}.w2.weight",
    }

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return {
            "num_local_experts": weights.num_experts,
            "num_experts_per_tok": weights.num_experts_per_token,
            "router_jitter_noise": 0.0,
            "head_dim": getattr(weights.config, "head_dim", None),
            "sliding_window": getattr(weights.config, "sliding_window", None),
        }

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        if getattr(weights.config, "attention_bias", False):
            yield "its attention has no bias"


class Phi3MixtralLayout(MixtralLayout):
    """Phi-3, whose fused matrices are split by rows. Its dropouts (0 in the published models) act in training only."""

    dense_types: ClassVar[tuple[str, ...]] = ("phi3",)
    dense_names = frozenset({"gate_up_proj.weight", "down_proj.weight"})

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        rope = dict(weights.config.rope_parameters)
        rope.pop("partial_rotary_factor", None)  # 1, or a misfit
        return super().fields(weights) | {"rope_parameters": rope}

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        rope = weights.config.rope_parameters
        if rope.get("partial_rotary_factor", 1.0) != 1:
            yield f"it rotates whole heads, the dense model {rope['partial_rotary_factor']:.0%} of each"
        if rope["rope_type"] != "default":
            yield f"Phi-3's {rope['rope_type']!r} positions have not been tried on it"

    def outside_mlp(self, weights: UpcycledWeights, name: str) -> Iterator[tuple[str, Tensor]]:
        if not name.endswith("qkv_proj.weight"):
            yield from super().outside_mlp(weights, name)
            return
        config, fused = weights.config, weights.dense[name]
        queries = config.num_attention_heads * (fused.shape[0] // _fused_heads(config))
        keys = (fused.shape[0] - queries) // 2
        for part, rows in zip("qkv", fused.split([queries, keys, keys]), strict=True):
            yield name.replace("qkv_proj", f"{part}_proj"), rows.clone()

    def expert(self, weights: UpcycledWeights, layer: int, position: int) -> Mapping[str, Tensor]:
        dense = weights.expert(layer, position)
        gate, up = (rows.clone() for rows in dense["gate_up_proj.weight"].chunk(2))
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": dense["down_proj.weight"]}


def _fused_heads(config: PretrainedConfig) -> int:
    """Heads in a fused projection: queries, keys and values."""
    return config.num_attention_heads + 2 * config.num_key_value_heads
