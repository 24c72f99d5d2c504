"""Greedy decoding with a cache: tokens a second of the adapter and of the exported model, beside the dense model.

In one run, taking turns, one sequence at a time: where every token reads all the weights it uses, an expert more a
token is so much more memory traffic. SmolLM2-135M's shape, random weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from measure import Ratio, keep_memory, print_table, take_turns
from models import SMOLLM2, dense, perturb, upcycled
from torch import nn
from transformers.utils import logging

PROMPT, NEW = 16, 64


@torch.inference_mode()
def decode(model: nn.Module, prompt: torch.Tensor) -> None:
    """Exactly `NEW` tokens."""
    tokens = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert tokens.shape[1] == PROMPT + NEW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    keep_memory()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    base = dense(torch.bfloat16, **SMOLLM2).eval()
    post_trained = copy.deepcopy(base)
    perturb(post_trained, 0.01)
    models: dict[str, nn.Module] = {"dense": base}
    for name, experts, options in (
        ("adapter, learned, top-2 of 3", 2, {"top_k": 2}),
        ("adapter, learned, top-1 of 3", 2, {"top_k": 1}),
        ("adapter, routing by language", 1, {"routing": "language"}),
    ):
        adapter = upcycled(copy.deepcopy(base), experts, **options).eval()
        for layer in adapter.base_model.layers().values():
            perturb(layer.moe_delta_experts)
        adapter.set_language("hu")
        models[name] = adapter
        if "learned" in name:
            models[name.replace("adapter", "exported Mixtral")] = adapter.merge_and_graft(copy.deepcopy(post_trained))
    prompt = torch.randint(SMOLLM2["vocab_size"], (1, PROMPT))
    cases: dict[str, Callable[[], None]] = {name: partial(decode, model, prompt) for name, model in models.items()}
    seconds = take_turns(cases, rounds, warm_up=1)
    rows = [(name, f"{NEW / min(seconds[name]):.1f}", Ratio.of(seconds, name, "dense")) for name in cases]
    print_table(
        f"Greedy decoding of {NEW} tokens, SmolLM2-135M's shape, bf16",
        ("", "fastest, tokens/s", f"time as a multiple of dense: median of {rounds} rounds (quartiles)"),
        rows,
    )


if __name__ == "__main__":
    main()
