"""Bits per byte, ours against lm_eval's rolling log-likelihood, on the same text: the two must agree within 1%.

    python tests/benchmarks/bench_harness.py [--inputs build/demo/inputs] [--bytes 6000]

Needs the demo's inputs (examples/demo_inputs.py) and the extra lm-eval.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moe_delta.evaluation import bits_per_byte

WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("build/demo/inputs"))
    parser.add_argument("--bytes", type=int, default=6000, help="of text a language")
    arguments = parser.parse_args()
    if not (arguments.inputs / "model").is_dir():
        print(f"skipped: no model in {arguments.inputs}; examples/demo_inputs.py --output makes one")
        return
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        print("skipped: the extra lm-eval is not installed")
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.inputs / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.inputs / "model")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=WINDOW, batch_size=4)
    print("language  ours     lm_eval  ratio")
    for language in ("en", "hu", "el"):
        texts = first_texts(arguments.inputs / f"text/{language}.test.jsonl", arguments.bytes)
        ours = bits_per_byte(model, tokenizer, texts, max_length=WINDOW, stride=WINDOW, batch_size=4).value
        requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
        nats = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
        theirs = nats / math.log(2) / sum(len(text.encode()) for text in texts)
        print(f"{language:8}  {ours:.5f}  {theirs:.5f}  {ours / theirs:.6f}", flush=True)


def first_texts(path: Path, limit: int) -> list[str]:
    """Whole documents up to a number of bytes."""
    texts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        texts.append(json.loads(line)["text"])
        if sum(len(text.encode()) for text in texts) >= limit:
            break
    return texts


if __name__ == "__main__":
    main()
