"""Measuring, grouping and allocating on prose: nine languages of the shared development data, on the demo's model.

Skips where the model (`examples/demo_inputs.py`) or the data beside the repository are absent. Prints the seconds of
each step, the similarity and deviation by depth, and the groups by either source.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measure import conditions, keep_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moe_delta import allocate_experts, group_languages
from peft_moe_delta.allocation import Measurement, measure_languages
from peft_moe_delta.sources import read_texts

LANGUAGES = ("en", "de", "fr", "hu", "tr", "el", "ru", "ja", "zh")
DATA = Path(__file__).parents[3] / "shared/data/libreoffice_help"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build/demo/inputs/model"))
    parser.add_argument("--tokens", type=int, default=5000, help="of a language, for similarity")
    parser.add_argument("--steps", type=int, default=10, help="of 512 tokens, for deviation; 0 leaves it out")
    arguments = parser.parse_args()
    if not DATA.is_dir() or not arguments.model.is_dir():
        print("skipped: no ../shared/data beside the repository, or no demo model (examples/demo_inputs.py)")
        return
    keep_memory()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {code: read_texts(str(DATA / f"{code}.jsonl"), limit_bytes=500_000) for code in LANGUAGES}
    seconds, statistics = {}, None
    for source in ("similarity", "deviation") if arguments.steps else ("similarity",):
        start = time.perf_counter()
        measurement = Measurement(tokens=arguments.tokens, steps=max(1, arguments.steps))
        measured = measure_languages(model, tokenizer, texts, sources=[source], measurement=measurement, progress=True)
        statistics = measured if statistics is None else statistics.merged(measured)
        seconds[source] = time.perf_counter() - start
    print(f"\n{statistics.table()}\n")
    for source in seconds:
        start = time.perf_counter()
        groups = group_languages(statistics.between_languages(source), num_groups=3)
        plan = allocate_experts(statistics, budget=2 * len(statistics.layers), languages=groups.as_languages())
        seconds[f"group and allocate by {source}"] = time.perf_counter() - start
        print(f"by {source}:\n\n{groups.table()}\n")
    print(f"{plan.table()}\n")
    print("\n".join(f"- {name}: {value:.1f} s" for name, value in seconds.items()))
    print(f"\n{conditions()}")


if __name__ == "__main__":
    main()
