"""The models that the benchmarks run: random weights in real shapes, dense and upcycled."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe_delta import MoeDeltaConfig

LANGUAGES = {"en": "original", "hu": "expanded"}
ENGLISH, HUNGARIAN = range(2)
"""Language ids."""

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "eos_token_id": None,  # generation always takes the tokens it is given
}
"""The shape of SmolLM2-135M."""


def dense(dtype: torch.dtype, **shape: Any) -> LlamaForCausalLM:
    """A Llama of random weights."""
    return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)


def upcycled(model: LlamaForCausalLM, experts: int, **options: Any) -> PeftModel:
    """An adapter with `experts` new experts for Hungarian in every layer, in the model's dtype."""
    config = MoeDeltaConfig(languages=dict(LANGUAGES), experts={"expanded": experts}, **options)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def perturb(module: nn.Module, share: float = 0.1) -> None:
    """Move every weight by noise of a share of its size, as if trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += share * parameter.abs().mean() * torch.randn_like(parameter)
