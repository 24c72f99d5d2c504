"""One card: the layer beside a dense MLP and transformers' Mixtral, a training step beside LoRA and full fine-tuning,
and decoding; tokens a second and peak memory, printed and written as one JSON.

`make bench-gpu` runs it. Without a card it says so and ends; `--device cpu` tries the same on tiny shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_decode import trained
from bench_layer import mixtral_step, plain_step, upcycled_step
from bench_training import lora
from measure import take_turns
from models import HUNGARIAN, dense, perturb, upcycled
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_moe_delta.tuner.passes import ForwardState

CARD: dict[str, Any] = {
    "layer": {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "vocab_size": 8},
    "tokens": 8192,
    "model": {  # Llama-3.2-1B's shape
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True, "eos_token_id": None,
    },
    "batch": (4, 1024),
    "decode": ((1, 32), 128, 64),
    "rounds": 10,
}  # fmt: skip
TINY: dict[str, Any] = {
    "layer": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 8},
    "tokens": 64,
    "model": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True, "eos_token_id": None,
    },
    "batch": (2, 16),
    "decode": ((1,), 8, 4),
    "rounds": 2,
}  # fmt: skip
EXPERTS, TOP_K, RANK = 4, 2, 16
LEARNED = f"ours, learned, top-{TOP_K} of {EXPERTS}"

Case = Callable[[], object]


class Bench:
    """Times and memory of cases on a device."""

    def __init__(self, device: torch.device, sizes: dict[str, Any]) -> None:
        self.device, self.sizes = device, sizes
        self.found: dict[str, list[dict[str, Any]]] = {}

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, section: str, name: str, tokens: int, case: Case) -> None:
        """Run a case by itself, and note it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = take_turns({name: case}, self.sizes["rounds"], warm_up=2, clock=self.clock)[name]
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        self.note(section, name, seconds=median, quartiles=(low, high), tokens_per_second=tokens / median)

    def note(self, section: str, name: str, **figures: Any) -> None:
        """Keep a case's figures, with the memory it took, and print them."""
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        self.found.setdefault(section, []).append({"name": name, **figures})
        peak = "" if figures["peak_bytes"] is None else f", {figures['peak_bytes'] / 1e9:.2f} GB"
        print(f"{section}: {name}: {figures['tokens_per_second']:,.0f} tokens/s{peak}", flush=True)

    def clear(self) -> None:
        """Forget the models that are gone."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def model_of(bench: Bench, dtype: torch.dtype) -> Any:
    """A dense model of random weights on the device."""
    torch.manual_seed(0)
    with bench.device:
        return dense(dtype, **bench.sizes["model"])


def layers(bench: Bench, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """A pass forward and backward of one layer, by kind."""
    shape, tokens = bench.sizes["layer"], bench.sizes["tokens"]
    shape = {**shape, "num_hidden_layers": 1}
    x = torch.randn(1, tokens, shape["hidden_size"], device=bench.device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)

    def told() -> ForwardState:
        ids = torch.full((1, tokens), HUNGARIAN, device=bench.device)
        return ForwardState((1, tokens), language_ids=ids, recording=True)

    with bench.device:
        plain = dense(dtype, **shape)
        yield "dense MLP, trainable", partial(plain_step, LlamaMLP(plain.config).to(dtype), x, gradient)
        for name, experts, options in (
            (LEARNED, EXPERTS - 1, {"top_k": TOP_K}),
            (f"{LEARNED}, rank {RANK}", EXPERTS - 1, {"top_k": TOP_K, "expert_rank": RANK}),
            ("ours, by language, 1 expert", 1, {"routing": "language"}),
        ):
            model = upcycled(dense(dtype, **shape), experts, **options)
            case = partial(upcycled_step, model.base_model.layers()[0], x, gradient, told)
            yield name, case
            model.base_model.set_experts_implementation("grouped_mm")
            yield f"{name}, grouped_mm", case
        config = MixtralConfig(**shape, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
        mixtral = MixtralForCausalLM._from_config(config, dtype=dtype)
    for kind in ("eager", "grouped_mm"):
        yield f"transformers' Mixtral, {kind}", partial(mixtral_step, mixtral, kind, x, gradient)


TRAININGS: dict[str, Callable[[Any], nn.Module]] = {
    "full fine-tuning": lambda model: model,
    f"LoRA, r = {RANK}, every linear layer": lora,
    "ours, by language, 1 full expert": lambda model: upcycled(model, 1, routing="language"),
    f"ours, learned, top-{TOP_K} of 3, 2 full experts": lambda model: upcycled(model, 2, top_k=TOP_K),
    f"ours, learned, top-{TOP_K} of 3, rank {RANK}": lambda model: upcycled(model, 2, top_k=TOP_K, expert_rank=RANK),
}


def training(bench: Bench, name: str) -> Case:
    """A step of AdamW in fp32 under bf16 autocast."""
    model = TRAININGS[name](model_of(bench, torch.float32)).to(bench.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = torch.randint(bench.sizes["model"]["vocab_size"], bench.sizes["batch"], device=bench.device)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if name.startswith("ours"):
        batch["language_ids"] = torch.full((len(tokens),), HUNGARIAN, device=bench.device)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoders(bench: Bench) -> Iterator[tuple[str, nn.Module]]:
    """What generates: the dense model and adapters over it, in bf16."""
    yield "dense", model_of(bench, torch.bfloat16).eval()
    learned = trained(upcycled(model_of(bench, torch.bfloat16), 2, top_k=TOP_K))
    yield f"adapter, learned, top-{TOP_K} of 3", learned
    post_trained = model_of(bench, torch.bfloat16)
    perturb(post_trained, share=0.01)
    yield "exported Mixtral, the same", learned.merge_and_graft(post_trained)
    by_language = trained(upcycled(model_of(bench, torch.bfloat16), 1, routing="language"))
    by_language.set_language("hu")
    yield "adapter, by language, 1 expert", by_language


def decode(bench: Bench, model: Any, rows: int) -> None:
    """New tokens after a prompt, greedily."""
    _, prompt, new = bench.sizes["decode"]
    ids = torch.randint(bench.sizes["model"]["vocab_size"], (rows, prompt), device=bench.device)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )


def run(bench: Bench) -> None:
    """Everything."""
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for name, case in layers(bench, dtype):
            bench.time(f"layer, {kind}", name, bench.sizes["tokens"], case)
        bench.clear()
    rows, length = bench.sizes["batch"]
    for name in TRAININGS:
        bench.time("training step", name, rows * length, training(bench, name))
        bench.clear()
    batches, _, new = bench.sizes["decode"]
    bench.sizes = {**bench.sizes, "rounds": 2}  # a round is many passes
    for name, model in decoders(bench):
        for rows in batches:
            bench.time(f"decode, batch {rows}", name, rows * new, partial(decode, bench, model, rows))
        bench.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for tiny shapes")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to measure; --device cpu tries the script itself.")
        return
    bench = Bench(device, CARD if device.type == "cuda" else TINY)
    run(bench)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny shapes: no figures to quote"
    report = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__, **bench.found,
    }  # fmt: skip
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"Written to {arguments.output}.")


if __name__ == "__main__":
    main()
