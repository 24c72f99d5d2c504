"""Forward and backward through an upcycled layer, as a multiple of the dense MLP it grew from.

In one run, taking turns: a trainable dense MLP; our layer under learned routing, top-2 of 4, expert 0 frozen;
transformers' Mixtral block of the same sizes and weights, with `eager` and with `grouped_mm` experts; our layer under
routing by language, where a batch of one language runs on one expert.

Two experts a token cost twice the dense MLP. A third of that is weight gradients, which the frozen expert does not
need: with f0 the share of choices that fall on it, the limit is 2 - (2/3) f0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Ratio, keep_memory, print_table, take_turns, verdict
from models import HUNGARIAN, dense, perturb, upcycled
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_moe_delta.tuner import MoeDeltaLayer
from peft_moe_delta.tuner.passes import ForwardState

TOKENS = 1024
EXPERTS, TOP_K = 4, 2
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8,
}
ROUNDS = {torch.bfloat16: 20, torch.float32: 6}
MIXTURE_LIMIT, HARD_LIMIT = 2.1, 1.05

DENSE, HARD = "dense MLP, trainable", "ours, routing by language, a batch of one language"
OURS = f"ours, learned routing, top-{TOP_K} of {EXPERTS}"
UNRECORDED = f"{OURS}, without auxiliary losses and statistics"
MIXTRALS = {f"transformers' Mixtral, {name}": name for name in ("eager", "grouped_mm")}


def layer(dtype: torch.dtype, new_experts: int, **options: Any) -> MoeDeltaLayer:
    """The upcycled MLP of a model with one decoder layer."""
    return upcycled(dense(dtype, **SHAPE), new_experts, **options).base_model.layers()[0]


def mixtral_like(ours: MoeDeltaLayer, dtype: torch.dtype) -> MixtralForCausalLM:
    """A stock Mixtral of one layer with the router and the experts of ours, all trainable."""
    config = MixtralConfig(**SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    model = MixtralForCausalLM._from_config(config, dtype=dtype)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight.copy_(ours.moe_delta_router["default"].weight)
        for index, expert in enumerate(ours.experts("default")):
            block.experts.gate_up_proj[index] = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            block.experts.down_proj[index] = expert.down_proj.weight
    return model


def upcycled_step(ours: MoeDeltaLayer, x: Tensor, gradient: Tensor, recording: bool) -> None:
    """One pass of our layer; the context that the model's own forward pass would set is set here."""
    ids = torch.full((1, TOKENS), HUNGARIAN)
    ours.context.current = ForwardState((1, TOKENS), language_ids=ids, recording=recording)
    y = ours(x)
    auxiliary = ours.context.current.auxiliary_loss()
    if auxiliary is None:
        y.backward(gradient)
    else:
        torch.autograd.backward([y, auxiliary], [gradient, None])
    forget_gradients(ours, x)


def mixtral_step(model: MixtralForCausalLM, implementation: str, x: Tensor, gradient: Tensor) -> None:
    """One pass of transformers' block under one implementation of its experts."""
    model.set_experts_implementation(implementation)
    plain_step(model.model.layers[0].mlp, x, gradient)


def plain_step(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """One pass of a module that needs nothing but hidden states."""
    module(x).backward(gradient)
    forget_gradients(module, x)


def forget_gradients(module: nn.Module, x: Tensor) -> None:
    """What the optimizer's `zero_grad` does."""
    module.zero_grad()
    x.grad = None


def check_same(ours: MoeDeltaLayer, mixtral: MixtralForCausalLM, x: Tensor) -> None:
    """Both compute the same, up to tokens whose choice flips where Mixtral's router rounds to 16 bits."""
    ours.context.current = ForwardState((1, TOKENS))
    with torch.no_grad():
        y, theirs = ours(x), mixtral.model.layers[0].mlp(x)
    difference = ((y - theirs).norm() / y.norm()).item()
    assert difference < (1e-5 if x.dtype == torch.float32 else 0.1), f"outputs differ by {difference:.1e}"


def share_on_expert_0(ours: MoeDeltaLayer, x: Tensor) -> float:
    """f0, the share of the tokens' choices that fall on the frozen expert."""
    return (ours.moe_delta_router["default"](x).topk(TOP_K).indices == 0).float().mean().item()


def measure(dtype: torch.dtype, rounds: int) -> None:
    """Time one dtype and print its table."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, SHAPE["hidden_size"]).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    mlp = LlamaMLP(dense(dtype, **SHAPE).config).to(dtype)
    ours, hard = layer(dtype, EXPERTS - 1, top_k=TOP_K), layer(dtype, 1, routing="language")
    perturb(ours.moe_delta_experts)
    mixtral = mixtral_like(ours, dtype)
    check_same(ours, mixtral, x)
    cases: dict[str, Callable[[], None]] = {
        DENSE: partial(plain_step, mlp, x, gradient),
        OURS: partial(upcycled_step, ours, x, gradient, recording=True),
        UNRECORDED: partial(upcycled_step, ours, x, gradient, recording=False),
        **{name: partial(mixtral_step, mixtral, kind, x, gradient) for name, kind in MIXTRALS.items()},
        HARD: partial(upcycled_step, hard, x, gradient, recording=True),
    }
    seconds = take_turns(cases, rounds, warm_up=3)
    ratios = {name: Ratio.of(seconds, name, DENSE) for name in cases}
    f0 = share_on_expert_0(ours, x)
    rows = [(name, f"{1000 * min(seconds[name]):,.0f}", ratios[name]) for name in cases]
    rows.insert(2, (f"the limit, 2 - (2/3) f0 with f0 = {f0:.2f}", "", f"{2 - 2 * f0 / 3:.2f}"))
    print_table(
        f"One layer, {SHAPE['hidden_size']} x {SHAPE['intermediate_size']}, {TOKENS:,} tokens, forward and backward, "
        f"{str(dtype).removeprefix('torch.')}",
        ("", "fastest, ms", f"times the dense MLP: median of {rounds} rounds (quartiles)"),
        rows,
    )
    mixture = ratios[OURS].median
    fastest = min(ratios[name].median for name in MIXTRALS)
    print(verdict("learned routing", mixture, MIXTURE_LIMIT))
    print(f"- learned routing: {mixture:.2f}, {'below' if mixture < fastest else 'NOT BELOW'} Mixtral's {fastest:.2f}")
    print(verdict("routing by language", ratios[HARD].median, HARD_LIMIT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="how many rounds to time (default: 20 in bf16, 6 in fp32)")
    chosen = parser.parse_args().rounds
    keep_memory()
    for dtype, rounds in ROUNDS.items():
        measure(dtype, chosen or rounds)


if __name__ == "__main__":
    main()
