"""GraniteMoe, for Granite, Gemma 1, Qwen2 and biased Llama models whose layers are all MoE.

It scales embeddings, residuals, attention and logits by numbers of its config, and softmaxes after the top-k, which is
the same as renormalising. A layer's experts are stored as one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GraniteMoeConfig

from .layout import MoeLayout, given_head_width
from .weights import UpcycledWeights

SCALES = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


class GraniteMoeLayout(MoeLayout):
    """Granite, whose scales carry over, and Llama with attention biases."""

    dense_types: ClassVar[tuple[str, ...]] = ("granite", "llama")
    config_class = GraniteMoeConfig
    router_name = "block_sparse_moe.router.layer.weight"
    expert_names: ClassVar = dict.fromkeys(
        ("gate_proj.weight", "up_proj.weight"), "block_sparse_moe.input_linear.weight"
    ) | {"down_proj.weight": "block_sparse_moe.output_linear.weight"}

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        config = weights.config
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        neutral = dict.fromkeys(SCALES, 1.0) | {"attention_multiplier": head_width**-0.5}
        return {
            "num_local_experts": weights.num_experts,
            "num_experts_per_tok": weights.num_experts_per_token,
            "attention_bias": getattr(config, "attention_bias", False),
            **{scale: getattr(config, scale, value) for scale, value in neutral.items()},
            **given_head_width(weights),
        }

    def mlp(self, weights: UpcycledWeights, layer: int) -> Iterator[tuple[str, Tensor]]:
        prefix = f"model.layers.{layer}."
        yield prefix + self.router_name, weights.router(layer)
        experts = [self.expert(weights, layer, position) for position in range(weights.num_experts)]
        gate_up = [torch.cat([expert["gate_proj.weight"], expert["up_proj.weight"]]) for expert in experts]
        yield prefix + self.expert_names["gate_proj.weight"], torch.stack(gate_up)
        yield prefix + self.expert_names["down_proj.weight"], torch.stack([e["down_proj.weight"] for e in experts])


class Qwen2GraniteMoeLayout(GraniteMoeLayout):
    """Qwen2: its output projection has no bias, so it gets one of zeros. llama.cpp and MLX run Qwen2-MoE wrongly."""

    dense_types: ClassVar[tuple[str, ...]] = ("qwen2",)

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return super().fields(weights) | {"attention_bias": True}

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        if (window := getattr(weights.config, "sliding_window", None)) is not None:
            yield f"it has no attention windows; the dense model has a sliding window of {window}"

    def outside_mlp(self, weights: UpcycledWeights, name: str) -> Iterator[tuple[str, Tensor]]:
        yield name, (tensor := weights.dense[name])
        if name.endswith("o_proj.weight"):
            yield name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0])


class GemmaGraniteMoeLayout(GraniteMoeLayout):
    """Gemma 1: its norms multiply by 1 + weight, and its embeddings are multiplied by the root of the hidden size."""

    dense_types: ClassVar[tuple[str, ...]] = ("gemma",)

    def fields(self, weights: UpcycledWeights) -> dict[str, Any]:
        return super().fields(weights) | {"embedding_multiplier": weights.config.hidden_size**0.5}

    def misfits(self, weights: UpcycledWeights) -> Iterator[str]:
        yield from super().misfits(weights)
        if weights.dtype not in (torch.float32, torch.float64):
            yield f"its norms are the dense model's plus 1, exact in fp32 only; the model is in {weights.dtype}"
        if getattr(weights.config, "use_bidirectional_attention", None):
            yield "its attention is causal"

    def outside_mlp(self, weights: UpcycledWeights, name: str) -> Iterator[tuple[str, Tensor]]:
        tensor = weights.dense[name]
        yield name, tensor + 1 if name.endswith("norm.weight") else tensor
