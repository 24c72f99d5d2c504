"""Pico models of every family, and the few steps that tests share: upcycle one, train its experts in a blink, run it.

Weights are seeded and large enough for every part of a model to show in its logits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chance import shifted
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.tuner import MoeDeltaLayer
from peft_moe_delta.tuner.experts import LowRankLinear
from peft_moe_delta.tuner.layer import Router

VOCABULARY = 99
HIDDEN = 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "olmo2": GATED,
    "granite": GATED,
    "phi3": GATED,
    "smollm3": GATED,
    "stablelm": GATED,
    "cohere": {**GATED, "logit_scale": 1.0},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "falcon": {},
    "bloom": {},
    "mpt": {},
}
"""Every supported family (`model_type`) with what its pico model needs beyond `SIZES`."""

LANGUAGES = {"hu": "uralic", "en": "original", "fi": "uralic", "az": "turkic"}
"""Neither languages nor groups are in alphabetical order; ids are hu 0, en 1, fi 2, az 3."""

EXPERTS = {"uralic": 2, "turkic": 1}
"""Experts in each layer: 0 the MLP, 1 and 2 Uralic, 3 Turkic."""


def pico(family: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A seeded pico model of a family, in evaluation mode; `config` overrides its sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shifted(seed))
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **config})
        )
    return randomise(model, seed).eval()


def randomise(model: nn.Module, seed: int, scale: float = 1.0) -> Any:
    """Move every floating-point weight of a module by seeded noise, in place. Returns the module."""
    generator = torch.Generator().manual_seed(shifted(seed))
    for parameter in model.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * (scale * size)
        noise = noise.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter.data += noise
    return model


def alike(model: PreTrainedModel, *languages: range, seed: int = 2) -> PreTrainedModel:
    """Give the tokens of each range a part of their embeddings in common, in place, as those of one language have.

    Gates and routers are linear: what tells the languages of a text apart must be so in pico models as well.
    """
    generator = torch.Generator().manual_seed(shifted(seed))
    for tokens in languages:
        model.get_input_embeddings().weight.data[list(tokens)] += torch.randn(HIDDEN, generator=generator)
    return model


def perturbed(model: nn.Module, seed: int = 10, scale: float = 0.2) -> Any:
    """A copy of a model with every weight moved: a post-trained model, or simply other weights of the same shape."""
    return randomise(copy.deepcopy(model), seed, scale)


def in_bf16(model: PreTrainedModel) -> PreTrainedModel:
    """As loading in bf16 does it: buffers such as rotary frequencies stay fp32, which `.bfloat16()` would round."""
    kind: Any = type(model)
    loaded = kind.from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=torch.bfloat16)
    loaded.name_or_path = ""  # not "None", for which the Hub would be asked
    return loaded


def moe_config(**changes: Any) -> MoeDeltaConfig:
    """A configuration with the languages above, learned routing and top-2, but for `changes`."""
    return MoeDeltaConfig(**{"languages": dict(LANGUAGES), "experts": dict(EXPERTS), **changes})


def upcycle(model: nn.Module, *, trained: bool = False, adapter: str = "default", **changes: Any) -> PeftModel:
    """`get_peft_model` with `moe_config(**changes)`, in evaluation mode; `trained`: `randomise_experts` on top."""
    upcycled = get_peft_model(model, moe_config(**changes), adapter_name=adapter).eval()
    return randomise_experts(upcycled, adapter) if trained else upcycled


def randomise_experts(model: Any, adapter: str = "default", seed: int = 1, scale: float = 1.0) -> Any:
    """Move an adapter's experts and routers by seeded noise, in place, as if trained. Returns the model."""
    for index, layer in enumerate(moe_layers(model, adapter)):
        for part in (layer.moe_delta_experts[adapter], layer.moe_delta_router[adapter]):
            for module in part.modules():
                if isinstance(module, LowRankLinear | Router):  # these started at random: forget that
                    for parameter in module.parameters():
                        parameter.data.zero_()
            randomise(part, 1000 * seed + index, scale)
    return model


def moe_layers(model: nn.Module, adapter: str | None = None) -> list[MoeDeltaLayer]:
    """The upcycled layers of a model, or those of one adapter, in order."""
    layers = [module for module in model.modules() if isinstance(module, MoeDeltaLayer)]
    return [layer for layer in layers if adapter is None or adapter in layer.settings]


def token_batch(batch: int = 3, length: int = 7, seed: int = 5) -> Tensor:
    """Seeded token ids above the special ones, (batch, length)."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(shifted(seed)))


def logits(model: nn.Module, tokens: Tensor, **arguments: Any) -> Tensor:
    """The model's logits, without gradients, in the mode it is in. The mask says "no padding" unless given."""
    with torch.no_grad():
        return model(**{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **arguments}).logits
