"""Forward and backward through an upcycled layer, as a multiple of the dense MLP it grew from.

In one run, taking turns: a trainable dense MLP; our layer under learned routing, top-2 of 4, expert 0 frozen;
transformers' Mixtral block of the same sizes and weights, with `eager` and with `grouped_mm` experts; our layer under
routing by language, where a batch of one language runs on one expert; and under routing by context, where the same text
is read first. A model reads it once a pass, for all layers; here one layer pays for it. Before its evidence suffices,
the first tokens run on expert 0: so does the row that is told the same, token by token, which tells what reading costs
from what a second expert's weights cost.

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
from models import ENGLISH, HUNGARIAN, dense, perturb, upcycled
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_moe_delta.routing.context import PassTokens
from peft_moe_delta.tuner import MoeDeltaLayer
from peft_moe_delta.tuner.identifier import Identifier, Identifiers
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

CONTEXT_LIMIT = 1.05  # times routing by language of the same tokens

DENSE, HARD = "dense MLP, trainable", "ours, routing by language, a batch of one language"
READ = "ours, routing by context, the same batch"
TOLD = "ours, routing by language, told of each token what the context says"
OURS = f"ours, learned routing, top-{TOP_K} of {EXPERTS}"
GROUPED = f"{OURS}, experts as one (grouped_mm)"
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


def reader() -> tuple[MoeDeltaLayer, Identifier]:
    """A layer under routing by context, and what reads the language: every token but the first is Hungarian."""
    model = upcycled(dense(torch.float32, **SHAPE), 1, routing="context")
    tokens = torch.arange(SHAPE["vocab_size"])
    counts = {"en": (tokens == 0).long(), "hu": (tokens > 0).long()}
    Identifiers.fill(model.get_base_model(), "default", model.active_peft_config, counts, 32)
    return model.base_model.layers()[0], Identifiers.required(model.get_base_model())


def told(recording: bool, grouped: bool = False, ids: Tensor | None = None) -> ForwardState:
    """A pass of Hungarian, or of these languages of its tokens, as the call says."""
    ids = torch.full((1, TOKENS), HUNGARIAN) if ids is None else ids
    return ForwardState((1, TOKENS), language_ids=ids, recording=recording, grouped=grouped)


def read(identifier: Identifier) -> ForwardState:
    """A pass of Hungarian, as its tokens say."""
    tokens = PassTokens.of(torch.ones(1, TOKENS, dtype=torch.int64), (1, TOKENS), {})
    return ForwardState((1, TOKENS), groups_read=identifier.groups(tokens), recording=True)


def languages_read(identifier: Identifier) -> Tensor:
    """(1, TOKENS) the languages that are read from that pass."""
    groups = read(identifier).groups_read
    assert groups is not None
    return torch.where(groups.view(1, TOKENS) > 0, HUNGARIAN, ENGLISH)


def upcycled_step(ours: MoeDeltaLayer, x: Tensor, gradient: Tensor, begin: Callable[[], ForwardState]) -> None:
    """One pass of our layer; the context that the model's own forward pass would set is set here."""
    ours.context.current = begin()
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
    reading, identifier = reader()
    ids = languages_read(identifier)
    perturb(ours.moe_delta_experts)
    mixtral = mixtral_like(ours, dtype)
    check_same(ours, mixtral, x)
    cases: dict[str, Callable[[], None]] = {
        DENSE: partial(plain_step, mlp, x, gradient),
        OURS: partial(upcycled_step, ours, x, gradient, partial(told, recording=True)),
        UNRECORDED: partial(upcycled_step, ours, x, gradient, partial(told, recording=False)),
        GROUPED: partial(upcycled_step, ours, x, gradient, partial(told, recording=True, grouped=True)),
        **{name: partial(mixtral_step, mixtral, kind, x, gradient) for name, kind in MIXTRALS.items()},
        HARD: partial(upcycled_step, hard, x, gradient, partial(told, recording=True)),
        TOLD: partial(
            upcycled_step, hard, x, gradient, partial(ForwardState, (1, TOKENS), language_ids=ids, recording=True)
        ),
        READ: partial(upcycled_step, reading.to(dtype), x, gradient, partial(read, identifier)),
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
    print(verdict("routing by context, times the same told", Ratio.of(seconds, READ, TOLD).median, CONTEXT_LIMIT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="how many rounds to time (default: 20 in bf16, 6 in fp32)")
    chosen = parser.parse_args().rounds
    keep_memory()
    for dtype, rounds in ROUNDS.items():
        measure(dtype, chosen or rounds)


if __name__ == "__main__":
    main()
