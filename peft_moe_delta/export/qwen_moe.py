"""Qwen2-MoE and Qwen3-MoE, which may keep some layers dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from .layout import SAME_EXPERT_NAMES, MoeLayout
from .weights import UpcycledWeights

SHARED_EXPERT_SIZE = 16
"""Intermediate size of Qwen2-MoE's zero shared expert: small, and divisible for tensor-parallel engines."""


class QwenMoeLayout(MoeLayout):
    """What the two have in common."""

    router_name = "mlp.gate.weight"
    keeps_dense_layers = True
    expert_names = SAME_EXPERT_NAMES

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return {
            "num_experts": weights.num_experts,
            "num_experts_per_tok": weights.num_experts_per_token,
            "moe_intermediate_size": weights.config.intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(weights.dense_layers),
            "use_sliding_window": False,
        }

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        window = getattr(weights.config, "sliding_window", None)
        if window is not None:
            yield f"its attention windows are laid out otherwise; the dense model has a sliding window of {window}"


class Qwen2MoeLayout(QwenMoeLayout):
    """Qwen2 models, and Llama and Mistral models that have dense layers: attention biases are zeros there.

    The architecture adds a shared expert to the routed ones; a small one of zeros adds exactly nothing. Its gate is
    ones: `sigmoid(gate x) 0` is 0 for any gate, and llama.cpp computes a sigmoid as silu(z) / z, not a number at z = 0.
    """

    dense_types = ("qwen2", "llama", "mistral")
    config_class = Qwen2MoeConfig

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return super().fields(weights) | {
            "shared_expert_intermediate_size": SHARED_EXPERT_SIZE,
            "qkv_bias": True,
            "layer_types": ["full_attention"] * weights.config.num_hidden_layers,
        }

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        config = weights.config
        if getattr(config, "attention_bias", False):
            yield "its output projection has no bias"
        width = config.hidden_size // config.num_attention_heads
        if getattr(config, "head_dim", None) not in (None, width):
            yield f"its heads are hidden_size / num_attention_heads = {width} wide, the dense model's {config.head_dim}"

    def outside_mlp(self, weights: UpcycledWeights, name: str) -> Iterator[tuple[str, Tensor]]:
        tensor = weights.dense[name]
        yield name, tensor
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and bias not in weights.dense:
            yield bias, tensor.new_zeros(tensor.shape[0])

    def mlp(self, weights: UpcycledWeights, layer: int) -> Iterator[tuple[str, Tensor]]:
        yield from super().mlp(weights, layer)
        if layer in weights.moe_layers:
            hidden, shared = weights.config.hidden_size, SHARED_EXPERT_SIZE
            shapes = {"gate_proj": (shared, hidden), "up_proj": (shared, hidden), "down_proj": (hidden, shared)}
            for matrix, shape in shapes.items():
                yield f"model.layers.{layer}.mlp.shared_expert.{matrix}.weight", torch.zeros(shape, dtype=weights.dtype)
            yield f"model.layers.{layer}.mlp.shared_expert_gate.weight", torch.ones(1, hidden, dtype=weights.dtype)


class Qwen3MoeLayout(QwenMoeLayout):
    """Qwen3 models with full attention."""

    dense_types = ("qwen3",)
    config_class = Qwen3MoeConfig

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return super().fields(weights) | {
            "head_dim": weights.config.head_dim,
            "attention_bias": weights.config.attention_bias,
        }

    def config(self, weights: UpcycledWeights) -> PretrainedConfig:
        config = super().config(weights)
        vars(config)["num_experts"] = weights.num_experts  # transformers 5 writes num_local_experts, 4 reads this one
        return config
