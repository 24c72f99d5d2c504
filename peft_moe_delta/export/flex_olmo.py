"""FlexOlmo, for OLMo2 models whose layers are all MoE: the same attention with normalised queries and keys."""

from __future__ import annotations

from typing import Any

from transformers import FlexOlmoConfig

from .layout import SAME_EXPERT_NAMES, MoeLayout, given_head_width
from .weights import UpcycledWeights


class FlexOlmoLayout(MoeLayout):
    dense_types = ("olmo2",)
    config_class = FlexOlmoConfig
    router_name = "mlp.gate.weight"
    expert_names = SAME_EXPERT_NAMES

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return {
            "num_experts": weights.num_experts,
            "num_experts_per_tok": weights.num_experts_per_token,
            "norm_topk_prob": True,
            "attention_bias": weights.config.attention_bias,
        } | given_head_width(weights)
