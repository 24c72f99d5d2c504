"""Mixtral, for Llama and Mistral models whose layers are all MoE. It always renormalises the top-k weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import MixtralConfig

from .layout import MoeLayout
from .weights import UpcycledWeights


class MixtralLayout(MoeLayout):
    dense_types = ("llama", "mistral")
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
            "head_dim": weights.config.head_dim,
            "sliding_window": getattr(weights.config, "sliding_window", None),
        }

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        if weights.dense_layers:
            yield f"all its layers are MoE, here the layers {list(weights.dense_layers)} have one expert"
        if getattr(weights.config, "attention_bias", False):
            yield "its attention has no bias"
