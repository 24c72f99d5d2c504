"""Greedy decoding, one sequence with a cache: the adapter and the exported stock model beside the dense model.

SmolLM2-135M's shape with random weights in bf16. The adapter decodes under learned routing, top-2 of 3, and with one
expert under routing by language, told and read from the text; the exported Mixtral is the first, grafted onto a
perturbed copy of the dense one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial

import torch
from measure import Ratio, keep_memory, print_table, take_turns
from models import SMOLLM2, dense, perturb, upcycled
from peft import PeftModel
from torch import nn

from peft_moe_delta.tuner.identifier import Identifiers

PROMPT, NEW = 16, 64
DENSE, TOLD = "dense", "adapter, routing by language, 1 expert"


def models() -> dict[str, nn.Module]:
    """The dense model and what grew from it, ready to generate."""
    torch.manual_seed(0)
    base = dense(torch.bfloat16, **SMOLLM2)
    post_trained = copy.deepcopy(base)
    perturb(post_trained, share=0.01)
    learned = trained(upcycled(copy.deepcopy(base), 2, top_k=2))
    hard = trained(upcycled(copy.deepcopy(base), 1, routing="language"))
    hard.set_language("hu")
    reading = trained(upcycled(copy.deepcopy(base), 1, routing="context"))
    everything = torch.ones(SMOLLM2["vocab_size"], dtype=torch.int64)
    counts = {"en": torch.where(torch.arange(len(everything)) == 0, everything, 0), "hu": everything}
    Identifiers.fill(reading.get_base_model(), "default", reading.active_peft_config, counts, 32)
    exported = learned.merge_and_graft(post_trained)
    return {
        DENSE: base.eval(),
        "adapter, learned routing, top-2 of 3": learned,
        f"exported {type(exported).__name__}, top-2 of 3": exported,
        TOLD: hard,
        "adapter, routing by context, 1 expert": reading,
    }


def trained(model: PeftModel) -> PeftModel:
    """Experts that differ from each other and from the MLP."""
    for layer in model.base_model.layers().values():
        perturb(layer.moe_delta_experts)
    return model.eval()


def generate(model: nn.Module, prompt: torch.Tensor) -> None:
    """`NEW` tokens, greedily."""
    mask = torch.ones_like(prompt)
    tokens = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == PROMPT + NEW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="how many rounds to time")
    rounds = parser.parse_args().rounds
    keep_memory()
    cast = models()
    prompt = torch.randint(SMOLLM2["vocab_size"], (1, PROMPT))
    seconds = take_turns({name: partial(generate, m, prompt) for name, m in cast.items()}, rounds, warm_up=1)
    (name,) = [name for name in cast if "by context" in name]
    print(f"{name}: {Ratio.of(seconds, name, TOLD)} times {TOLD}")
    print_table(
        f"Greedy decoding on SmolLM2-135M's shape, batch 1, {NEW} new tokens after {PROMPT}, bfloat16",
        ("", "parameters, M", "tokens/s", f"time, times the dense model: median of {rounds} rounds (quartiles)"),
        [
            (
                name,
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}",
                f"{NEW / statistics.median(seconds[name]):.1f}",
                Ratio.of(seconds, name, DENSE),
            )
            for name, model in cast.items()
        ],
    )


if __name__ == "__main__":
    main()
