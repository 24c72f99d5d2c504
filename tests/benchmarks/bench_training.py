"""A training step: tokens a second and peak memory of expansion and review beside full fine-tuning and LoRA.

Each variant trains in a process of its own, so that its peak memory is its own; the processes take turns.
SmolLM2-135M's shape, random weights in fp32 under bf16 autocast, AdamW, batches of half Hungarian and half Greek.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import print_table
from models import SMOLLM2, dense
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_moe_delta import MoeDeltaConfig

BATCH, LENGTH, STEPS = 4, 128, 4
FULL = "full fine-tuning"
EXPERTS = {
    "languages": {"en": "original", "hu": "hungarian", "el": "greek"},
    "experts": {"hungarian": 1, "greek": 1},
}
VARIANTS = {
    FULL: None,
    "LoRA, r=16, all linear layers": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "expansion, full experts, routing by language": MoeDeltaConfig(**EXPERTS, routing="language"),
    "expansion, full experts, learned, top-2 of 3": MoeDeltaConfig(**EXPERTS, top_k=2),
    "expansion, rank-16 experts, routing by language": MoeDeltaConfig(**EXPERTS, routing="language", expert_rank=16),
    "review, learned, top-2 of 3": MoeDeltaConfig(**EXPERTS, top_k=2, stage="review"),
    "review, learned, top-1 of 3": MoeDeltaConfig(**EXPERTS, top_k=1, stage="review"),
}


def train(variant: str) -> dict[str, float]:
    """Seconds of the median step after a first one, and peak anonymous memory in bytes, of this process."""
    torch.manual_seed(0)
    model: nn.Module = dense(torch.float32, **SMOLLM2)
    if (config := VARIANTS[variant]) is not None:
        model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    languages = {"language_ids": torch.tensor([1, 2] * (BATCH // 2))} if isinstance(config, MoeDeltaConfig) else {}
    seconds = []
    for _ in range(1 + STEPS):
        ids = torch.randint(SMOLLM2["vocab_size"], (BATCH, LENGTH))
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, **languages).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped = sum(int(status[key].split()[0]) for key in ("RssFile", "RssShmem"))
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": 1024 * (int(status["VmHWM"].split()[0]) - mapped),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # what a process of one variant is told
    chosen = parser.parse_args()
    if chosen.variant:
        print(json.dumps(train(chosen.variant)))
        return
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(chosen.rounds):
        for variant, measured in results.items():
            command = [sys.executable, __file__, "--variant", variant]
            measured.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    rows = []
    for variant, measured in results.items():
        tokens = BATCH * LENGTH / statistics.median(m["seconds"] for m in measured)
        pairs = zip(measured, results[FULL], strict=True)
        ratio = statistics.median(mine["seconds"] / full["seconds"] for mine, full in pairs)
        memory = statistics.median(m["bytes"] for m in measured) / 1e9
        rows.append(
            (variant, f"{measured[0]['trainable'] / 1e6:.1f}", f"{tokens:.0f}", f"{ratio:.2f}", f"{memory:.2f}")
        )
    print_table(
        f"A training step of {BATCH} x {LENGTH} tokens, SmolLM2-135M's shape, bf16 autocast",
        ("", "trained, M", "tokens/s", f"time / full fine-tuning, median of {chosen.rounds} rounds", "peak memory, GB"),
        rows,
    )


if __name__ == "__main__":
    main()
