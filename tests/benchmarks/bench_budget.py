"""What three large models take to train, from their published sizes alone: the tables of docs/training.md.

One full expert by language over a bf16 base, and what else would fit, on 8 GPUs of 80 GB. No GPU has measured this:
`peft-moe-delta plan` says the same of a recipe.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig

from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.budget import Job, plan_budget

LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128_256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "llama",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "Qwen3-8B": (
        "qwen3",
        {
            "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        },
    ),
    "Llama-3.1-70B": (
        "llama",
        {**LLAMA, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
}  # fmt: skip
GPUS, MEMORY = 8, 80 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one; may be given again")
    adapter = MoeDeltaConfig(
        languages={"en": "original", "hu": "expanded"}, experts={"expanded": 1}, routing="language"
    )
    for name in parser.parse_args().model or MODELS:
        family, sizes = MODELS[name]
        job = Job(AutoConfig.for_model(family, **sizes), adapter, 4, 2048, dtype=torch.bfloat16, checkpointing=True)
        print(f"\n**{name}**\n\n{plan_budget(job, GPUS, MEMORY).table()}", flush=True)


if __name__ == "__main__":
    main()
