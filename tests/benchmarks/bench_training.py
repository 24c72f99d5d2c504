"""Tokens a second and peak memory of a training step: expansion beside full fine-tuning and LoRA on the same model.

SmolLM2-135M's shape with random weights, fp32 under bf16 autocast, AdamW, 4 x 128 tokens. Every variant runs in a
process of its own, so that its peak memory is its own; the processes take turns, round after round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Ratio, print_table, take_turns
from models import HUNGARIAN, SMOLLM2, dense, upcycled
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

BATCH, SEQUENCE = 4, 128
RANK = 16
FULL = "full fine-tuning"


def lora(model: LlamaForCausalLM) -> nn.Module:
    """LoRA on every linear layer but the output embedding."""
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))


VARIANTS: dict[str, Callable[[LlamaForCausalLM], nn.Module]] = {
    FULL: lambda model: model,
    f"LoRA, r = {RANK}, every linear layer": lora,
    "ours, routing by language, 1 full expert": lambda model: upcycled(model, 1, routing="language"),
    "ours, learned routing, top-2 of 3, 2 full experts": lambda model: upcycled(model, 2, top_k=2),
    f"ours, routing by language, 1 expert of rank {RANK}": lambda model: upcycled(
        model, 1, routing="language", expert_rank=RANK
    ),
    f"ours, learned routing, top-2 of 3, 2 experts of rank {RANK}": lambda model: upcycled(
        model, 2, top_k=2, expert_rank=RANK
    ),
}


def train(variant: str, steps: int) -> dict[str, Any]:
    """Train one variant in this process: seconds of each step, trainable parameters, peak bytes of memory."""
    torch.manual_seed(0)
    model = VARIANTS[variant](dense(torch.float32, **SMOLLM2)).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    tokens = torch.randint(SMOLLM2["vocab_size"], (BATCH, SEQUENCE))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if variant.startswith("ours"):
        batch["language_ids"] = torch.full((BATCH,), HUNGARIAN)  # as LanguageCollator gives them

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = take_turns({variant: step}, steps, warm_up=2)[variant]
    return {"seconds": seconds, "trainable": sum(p.numel() for p in trainable), "peak": peak_memory()}


def peak_memory() -> int:
    """Bytes this process held at most, without the files it maps, which are the libraries."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    mapped = sum(int(line[1]) for line in lines if line[0] in ("RssFile:", "RssShmem:"))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mapped)


def train_apart(variant: str, steps: int) -> dict[str, Any]:
    """`train` in a fresh process, with memory in pages of the usual size: huge ones would be counted whole."""
    command = [sys.executable, __file__, "--variant", variant, "--steps", str(steps)]
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how many fresh processes a variant")
    parser.add_argument("--steps", type=int, default=4, help="how many steps to time in each, after two")
    parser.add_argument("--variant", choices=VARIANTS, help="train this one in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(train(arguments.variant, arguments.steps)))
        return
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for variant in tqdm(list(VARIANTS) * arguments.rounds, desc="training", disable=None):
        runs[variant].append(train_apart(variant, arguments.steps))
    seconds = {variant: [statistics.median(run["seconds"]) for run in done] for variant, done in runs.items()}
    print_table(
        f"A training step on SmolLM2-135M's shape, {BATCH} x {SEQUENCE} tokens, float32 under bfloat16 autocast, AdamW",
        ("", "trainable, M", "tokens/s", f"times {FULL}: median of {arguments.rounds} rounds (quartiles)", "peak, GB"),
        [
            (
                variant,
                f"{done[0]['trainable'] / 1e6:.1f}",
                f"{BATCH * SEQUENCE / statistics.median(seconds[variant]):,.0f}",
                Ratio.of(seconds, variant, FULL),
                f"{statistics.median(run['peak'] for run in done) / 1e9:.2f}",
            )
            for variant, done in runs.items()
        ],
    )


if __name__ == "__main__":
    main()
