"""What a layer keeps for its backward pass: bytes per token and hidden unit, beside the dense MLP, which trains.

Counted with saved-tensor hooks, each storage once and weights left out; the shape is Llama-3.1-8B's at an eighth of its
width. Nothing is timed, so it may run on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_layer import TOKENS, told
from measure import print_table
from models import dense, upcycled
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_moe_delta.tuner import MoeDeltaLayer

SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 8,
}  # fmt: skip
LEARNED = {"top_k": 2}
HARD = {"routing": "language"}


def kept_bytes(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that a pass keeps, without parameters and their views."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run(x)
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def pass_of(layer: MoeDeltaLayer, x: Tensor, grouped: bool = False) -> Tensor:
    """A recorded training pass of the layer, with its auxiliary loss."""
    layer.context.current = told(recording=True, grouped=grouped)
    y = layer(x)
    auxiliary = layer.context.current.auxiliary_loss()
    return y if auxiliary is None else y.sum() + auxiliary


def layer_of(experts: int, fp32: bool = False, **options: Any) -> MoeDeltaLayer:
    model: PeftModel = upcycled(dense(torch.bfloat16, **SHAPE), experts, **options)
    layer = model.base_model.layers()[0]
    if fp32:  # as PEFT makes experts over a 16-bit base
        layer.moe_delta_experts.float()
    return layer.train()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, SHAPE["hidden_size"], dtype=torch.bfloat16).requires_grad_()
    mlp = LlamaMLP(dense(torch.bfloat16, **SHAPE).config).bfloat16()
    cases: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {"dense MLP, bf16": (mlp, mlp)}
    for name, layer in {
        "learned, top-2 of 4, experts in bf16": layer_of(3, **LEARNED),
        "learned, top-2 of 4, experts in fp32": layer_of(3, fp32=True, **LEARNED),
        "learned, top-2 of 4, experts of rank 16 in fp32": layer_of(3, fp32=True, expert_rank=16, **LEARNED),
        "learned, top-1 of 4, experts in bf16": layer_of(3, top_k=1),
        "by language, one expert in bf16": layer_of(1, **HARD),
        "by language, one expert in fp32": layer_of(1, fp32=True, **HARD),
    }.items():
        cases[name] = layer, partial(pass_of, layer)
    as_one = layer_of(3, **LEARNED)
    cases["learned, top-2 of 4, experts in bf16, as one"] = as_one, partial(pass_of, as_one, grouped=True)
    per_unit = {name: kept_bytes(module, run, x) / x.numel() for name, (module, run) in cases.items()}
    first = next(iter(per_unit.values()))
    print_table(
        f"Kept for the backward pass, {SHAPE['hidden_size']} x {SHAPE['intermediate_size']}, {TOKENS:,} tokens",
        ("", "bytes per token and hidden unit", "times the dense MLP"),
        [(name, f"{value:.0f}", f"{value / first:.2f}") for name, value in per_unit.items()],
    )


if __name__ == "__main__":
    main()
