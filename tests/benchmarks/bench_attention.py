"""Forward pass through attention experts, as a multiple of the dense attention they grew from.

In one run, taking turns: a Llama's attention module and the soft mixtures of N = 2, 3 and 4 experts over it, with
shared keys and values and with their own. Beside the time: floating-point operations as PyTorch's own counter sees
them, and the size of the cache, both as multiples of the dense module's. The last column is what a whole decoder layer
with that attention costs beside the dense one, in operations, its MLP top-2 as is usual.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Ratio, keep_memory, print_table, take_turns
from models import dense, perturb, upcycled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "attn_implementation": "sdpa",
}
TOKENS = 512
EXPERTS = (2, 3, 4)
VARIANTS = ("shared_kv", "full")


def mixture(variant: str, experts: int) -> Any:
    """A one-layer model with that many attention and MLP experts, its base model's own included."""
    torch.manual_seed(0)
    model = upcycled(dense(torch.float32, **SHAPE), experts - 1, attention_experts=variant, top_k=2).eval()
    for layer in model.base_model.expert_layers():
        perturb(layer[2].moe_delta_experts)
    return model


def layer_of(model: nn.Module) -> Any:
    """The one decoder layer of a model, dense or upcycled."""
    return next(module for name, module in model.named_modules() if name.endswith("layers.0"))


def attend(model: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor], cache: Any = None) -> None:
    """One causal pass through the attention module alone."""
    with torch.inference_mode():
        layer_of(model).self_attn(
            hidden_states=x, position_embeddings=positions, attention_mask=None, past_key_values=cache
        )


def operations(model: Any, call: Callable[[], object]) -> int:
    """Floating-point operations of a call, with plain matrix products in place of fused attention, to be counted."""
    config = next(module for module in model.modules() if isinstance(module, LlamaAttention)).config
    config._attn_implementation = "eager"
    try:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()
    finally:
        config._attn_implementation = SHAPE["attn_implementation"]


def cache_size(model: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor]) -> int:
    """Numbers that the cache holds after one pass."""
    cache = DynamicCache()
    attend(model, x, positions, cache)
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def whole_layer(model: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor]) -> None:
    """One pass through the decoder layer."""
    with torch.inference_mode():
        layer_of(model)(x, attention_mask=None, position_embeddings=positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how many rounds to time")
    rounds = parser.parse_args().rounds
    keep_memory()
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, SHAPE["hidden_size"])
    plain = dense(torch.float32, **SHAPE).eval()
    positions = plain.model.rotary_emb(x, torch.arange(TOKENS)[None])
    models = {"dense": plain} | {f"{v}, N = {n}": mixture(v, n) for n in EXPERTS for v in VARIANTS}
    seconds = take_turns({n: partial(attend, m, x, positions) for n, m in models.items()}, rounds, warm_up=3)
    figures = {
        name: (
            operations(model, partial(attend, model, x, positions)),
            cache_size(model, x, positions),
            operations(model, partial(whole_layer, model, x, positions)),
        )
        for name, model in models.items()
    }
    rows = []
    for name, values in figures.items():
        attention, cache, layer = (mine / theirs for mine, theirs in zip(values, figures["dense"], strict=True))
        milliseconds = f"{1000 * min(seconds[name]):,.1f}"
        ratio = Ratio.of(seconds, name, "dense")
        rows.append((name, milliseconds, ratio, f"{attention:.2f}", f"{cache:.0f}", f"{layer:.2f}"))
    print_table(
        f"Attention forward, hidden {SHAPE['hidden_size']}, {SHAPE['num_attention_heads']} heads over "
        f"{SHAPE['num_key_value_heads']}, {TOKENS} tokens, fp32, times the dense module",
        (
            "",
            "fastest, ms",
            f"time: median of {rounds} rounds (quartiles)",
            "operations",
            "cache",
            "layer's operations",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
