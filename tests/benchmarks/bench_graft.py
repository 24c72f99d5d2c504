"""Grafting from files to files, beside plain copies of the same files, and mergekit where it is installed.

A seeded pair of Llamas of 1.1B parameters in bf16 (random weights, post-trained = base + noise) and an adapter: rank-16
experts in every layer, or full ones in four. Every graft runs in a process of its own, which reports its time without
imports and its peak anonymous memory. A copy reads all inputs and writes all outputs, waiting for the disk as the graft
does. The same with four times the layers, narrower, shows whether memory grows.

    python tests/benchmarks/bench_graft.py [--folder DIR] [--rounds N] [--mergekit COMMAND]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from measure import Ratio, print_table, verdict
from safetensors.torch import save_file
from transformers import LlamaConfig

from peft_moe_delta import MoeDeltaConfig, graft_checkpoint
from peft_moe_delta.checkpoint import CheckpointReader
from peft_moe_delta.tuner.fingerprint import fingerprint

LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
NARROW = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22}
DEEP = NARROW | {"num_hidden_layers": 88}
LAYERS_A_SHARD = 8
RANK = 16
FULL_LAYERS = 4
RATIO_LIMIT, MEMORY_LIMIT = 2.5, 1.5


def config_of(shape: dict[str, int]) -> LlamaConfig:
    """TinyLlama's other sizes."""
    return LlamaConfig(
        **shape, vocab_size=32_000, num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def shapes_of(config: LlamaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder layer."""
    d, i, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    inside = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d), "self_attn.k_proj.weight": (kv, d), "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, d),
        "mlp.gate_proj.weight": (i, d), "mlp.up_proj.weight": (i, d), "mlp.down_proj.weight": (d, i),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}


def write_pair(config: LlamaConfig, folder: Path) -> None:
    """Base and post-trained checkpoints in shards."""
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, tuple[int, ...]]] = []
    for layer in range(config.num_hidden_layers):
        if layer % LAYERS_A_SHARD == 0:
            groups.append({})
        groups[-1] |= shapes_of(config, layer)
    width = (config.vocab_size, config.hidden_size)
    groups[0]["model.embed_tokens.weight"] = groups[-1]["lm_head.weight"] = width
    groups[-1]["model.norm.weight"] = (config.hidden_size,)
    weight_map: dict[str, str] = {}
    for side in ("base", "post"):
        (folder / side).mkdir(parents=True)
        config.save_pretrained(folder / side)
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        base = {name: noise(shape, 0.02, generator) for name, shape in group.items()}
        save_file(base, folder / "base" / file, metadata={"format": "pt"})
        post = {name: tensor + noise(tensor.shape, 0.001, generator) for name, tensor in base.items()}
        save_file(post, folder / "post" / file, metadata={"format": "pt"})
    for side in ("base", "post"):
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(index))


def noise(shape: Any, size: float, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * size).bfloat16()


def write_adapter(config: LlamaConfig, folder: Path, full: bool) -> None:
    """An adapter as training leaves it: one expert in every layer, low-rank, or in four layers, full."""
    generator = torch.Generator().manual_seed(1)
    layers = range(config.num_hidden_layers)
    chosen = set(range(0, len(layers), -(-len(layers) // FULL_LAYERS)) if full else layers)
    tensors: dict[str, torch.Tensor] = {}
    blocks: list[dict[str, str]] = []
    for layer in layers:
        mlp = f"base_model.model.model.layers.{layer}.mlp."
        blocks.append({})
        for name, shape in shapes_of(config, layer).items():
            matrix = name.split(".mlp.")[-1]
            if ".mlp." not in name:
                continue
            blocks[-1][matrix] = name
            key = f"{mlp}moe_delta_experts.0.{matrix}"
            if layer not in chosen:
                continue
            if full:
                tensors[key] = noise(shape, 0.02, generator)
            else:
                tensors[key.replace(".weight", ".A")] = noise((RANK, shape[1]), 0.02, generator)
                tensors[key.replace(".weight", ".B")] = noise((shape[0], RANK), 0.02, generator)
        if layer in chosen:
            tensors[f"{mlp}moe_delta_router.weight"] = noise((2, config.hidden_size), 0.02, generator).float()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    MoeDeltaConfig(
        languages={"en": "original", "hu": "expanded"},
        experts={"expanded": [int(layer in chosen) for layer in layers]},
        expert_rank=None if full else RANK,
        target_modules=["mlp"],
        base_fingerprint=fingerprint(CheckpointReader(folder.parent / "base"), len(blocks)),
        base_model_name_or_path="base",
    ).save_pretrained(str(folder))


def run_graft(arguments: list[str]) -> None:
    """In a child: graft, and say how long it took and how much anonymous memory it needed."""
    peak, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous_memory(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    graft_checkpoint(*arguments, shard_size="2GB")
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak": peak}))


def anonymous_memory(process: int) -> float:
    """RssAnon in GB; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon")), 0.0)


def graft(trio: list[Path], output: Path) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--graft", *map(str, [*trio, output])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def copy(trio: list[Path], output: Path, target: Path) -> float:
    """Read every input once, write every output once, and wait for the disk. Returns seconds."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    buffer = bytearray(1 << 22)
    start = time.perf_counter()
    for folder in trio:
        for file in sorted(folder.iterdir()):
            with file.open("rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass
    for file in sorted(output.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb+") as copied:
            os.fsync(copied.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def merge_with_mergekit(command: str, folder: Path) -> dict[str, float]:
    """`task_arithmetic` on the dense pair; seconds include its imports, as its command does."""
    recipe = folder / "mergekit.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {folder / 'base'}\ndtype: bfloat16\n"
        f"models:\n  - model: {folder / 'post'}\n    parameters: {{weight: 1.0}}\n"
    )
    target, peak, start = folder / "merged", 0.0, time.perf_counter()
    process = subprocess.Popen(
        [*command.split(), str(recipe), str(target), "--lazy-unpickle"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed on {recipe}")
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return {"seconds": seconds, "peak": peak}


def size(folders: list[Path]) -> float:
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / 1e9


def case(name: str, trio: list[Path], folder: Path, rounds: int) -> tuple[list[object], float, float]:
    """A row of the table, the ratio's median, and the peak memory."""
    output, seconds, peaks = folder / "out", {"graft": [], "copy": []}, []
    for _ in range(rounds):
        result = graft(trio, output)
        seconds["graft"].append(result["seconds"])
        peaks.append(result["peak"])
        seconds["copy"].append(copy(trio, output, folder / "copied"))
    ratio, read, written = Ratio.of(seconds, "graft", "copy"), size(trio), size([output])
    shutil.rmtree(output)
    best = min(seconds["graft"])
    row = [
        name,
        f"{read:.1f}",
        f"{written:.1f}",
        f"{best:.1f}",
        f"{min(seconds['copy']):.1f}",
        ratio,
        f"{max(peaks):.2f}",
    ]
    return row, ratio.median, max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to put about 15 GB (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="its mergekit-yaml command")
    parser.add_argument("--graft", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.graft:
        run_graft(arguments.graft)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        rows, verdicts, merged = measure(Path(place), arguments.rounds, arguments.mergekit)
    print_table(
        f"Grafting from files to files, bf16: best of {arguments.rounds} rounds, ratio their median (quartiles)",
        ("", "read, GB", "written, GB", "graft, s", "copy, s", "times the copy", "peak RssAnon, GB"),
        rows,
    )
    print("\n".join(verdicts + merged))


def measure(folder: Path, rounds: int, mergekit: str | None) -> tuple[list[list[object]], list[str], list[str]]:
    """All cases, one folder of checkpoints at a time."""
    rows, verdicts, merged, peaks = [], [], [], {}
    for label, shape in (("1.1B", LARGE), ("22 narrow layers", NARROW), ("88 narrow layers", DEEP)):
        config, place = config_of(shape), folder / "models"
        write_pair(config, place)
        for full in (False, True):
            write_adapter(config, place / f"adapter-{full}", full)
            name = f"{label}, {'full experts in 4 layers' if full else f'rank-{RANK} experts'}"
            trio = [place / "base", place / "post", place / f"adapter-{full}"]
            row, ratio, peak = case(name, trio, folder, rounds if shape is LARGE else 1)
            rows.append(row)
            peaks[label, full] = peak
            if shape is LARGE:
                verdicts.append(verdict(f"{name}: time, times the copy", ratio, RATIO_LIMIT))
                verdicts.append(verdict(f"{name}: peak RssAnon, GB", peak, MEMORY_LIMIT))
        if shape is LARGE and mergekit:
            found = merge_with_mergekit(mergekit, place)
            merged = [
                f"- mergekit task_arithmetic on the dense pair: {found['seconds']:.1f} s with its imports, peak "
                f"{found['peak']:.2f} GB"
            ]
        shutil.rmtree(place)
    for full in (False, True):
        growth = peaks["88 narrow layers", full] - peaks["22 narrow layers", full]
        verdicts.append(f"- four times the layers, {'full' if full else 'low-rank'}: peak {growth:+.2f} GB")
    return rows, verdicts, merged or ["- mergekit is not installed"]


if __name__ == "__main__":
    main()
