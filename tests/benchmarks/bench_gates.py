"""Gates of a real model: how many tokens go where they belong, fitted in closed form and after a short review.

    python examples/demo_inputs.py --output build/demo/inputs      # the text, and a model
    python tests/benchmarks/bench_gates.py

LayerMoE's classifiers (arXiv 2505.22582) on the four layers of SmolLM2-135M where languages look most alike: the shares
of held-out English, Hungarian and Greek tokens that each gate takes for English. Experts are untrained. One seed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from learning import cosine, train
from measure import conditions, print_table
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_moe_delta import MoeDeltaConfig, fit_routers
from peft_moe_delta.allocation import Measurement, measure_languages
from peft_moe_delta.routing import most_similar_layers
from peft_moe_delta.sources import read_texts
from peft_moe_delta.tuner import MoeDeltaLayer

ENGLISH, HUNGARIAN, GREEK = "en", "hu", "el"
CODES = (ENGLISH, HUNGARIAN, GREEK)
ROWS, LENGTH = 9, 128
GATES, FITTED_ROWS = 4, 200
RECOGNISED = 0.95
"""Target: the share of tokens that a gate sends where they belong."""


def read(inputs: Path, part: str) -> dict[str, list[str]]:
    """Documents by language; held-out English is Wikipedia and interface text in turn, where both are there."""
    texts = {code: read_texts(inputs / "text" / f"{code}.{part}.jsonl") for code in CODES}
    more = inputs / "more_text" / ENGLISH / f"{part}.jsonl"
    if part == "test" and more.is_file():
        both = chain.from_iterable(zip_longest(texts[ENGLISH], read_texts(more)))
        texts[ENGLISH] = [text for text in both if text is not None]
    return texts


def rows_of(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, list[str]], tokens: int, seed: int) -> Any:
    """Shuffled rows of `LENGTH` tokens by language, (N, LENGTH)."""
    rows = {}
    for code, documents in texts.items():
        encoded = tokenizer(random.Random(seed).sample(documents, len(documents)), verbose=False)["input_ids"]
        ids = torch.tensor([t for found in encoded for t in [*found, tokenizer.eos_token_id]])
        whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
        rows[code] = whole[order][: -(-tokens // LENGTH)]
    return rows


def review(model: PeftModel, rows: Mapping[str, Tensor], steps: int) -> None:
    """Train the gates on equally many rows of each language a step."""
    each = ROWS // len(rows)

    def batches() -> Iterator[dict[str, Any]]:
        for step in range(steps):
            ids = torch.cat([found[[(step * each + i) % len(found) for i in range(each)]] for found in rows.values()])
            codes = [code for code in rows for _ in range(each)]
            yield {"input_ids": ids, "labels": ids, "language": codes, "use_cache": False}

    schedule = cosine(steps, warm_up=max(1, steps // 10), floor=0.0)
    train(model, batches(), 2e-3, schedule, steps=steps, label="gates", weight_decay=0.01)


@torch.no_grad()
def recognised(model: PeftModel, rows: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Gate layer -> share of each language's held-out tokens that the gate takes for original ones."""
    taken: dict[str, dict[str, list[Tensor]]] = {str(layer): {code: [] for code in rows} for layer in model.layers()}

    def note(layer: MoeDeltaLayer, args: tuple[Tensor], *, into: list[Tensor]) -> None:
        gate = layer.classifier("default")
        assert gate is not None
        into.append(gate.recognises(args[0].flatten(0, 1), 0))

    for code, held_out in rows.items():
        layers = model.layers().items()
        handles = [m.register_forward_pre_hook(partial(note, into=taken[str(i)][code])) for i, m in layers]
        for batch in held_out.split(8):
            model(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()
    return {i: {c: torch.cat(parts).float().mean().item() for c, parts in by.items()} for i, by in taken.items()}


def gates(inputs: Path, steps: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Gates on the layers where languages look most alike."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    text = read(inputs, "train")
    rows = rows_of(tokenizer, text, tokens, seed)
    test_rows = rows_of(tokenizer, read(inputs, "test"), tokens // 2, seed)
    measurement = Measurement(tokens=2000, sequence_length=LENGTH)
    statistics = measure_languages(base, tokenizer, text, sources=["similarity"], measurement=measurement)
    similarity = statistics.similarity([HUNGARIAN, GREEK], [ENGLISH]).tolist()
    layers = most_similar_layers(similarity, count=GATES)
    config = MoeDeltaConfig(
        languages={ENGLISH: "original", HUNGARIAN: "hungarian", GREEK: "greek"},
        experts={"hungarian": 1, "greek": 1},
        layers_to_transform=layers,
        classifier_layers=layers,
        routing="classifier",
    )
    model = get_peft_model(base, config)
    documents = {code: tokenizer.batch_decode(found[:FITTED_ROWS]) for code, found in rows.items()}
    fit_routers(model, documents, tokenizer, only="gates", max_length=LENGTH)
    fitted = recognised(model, test_rows)
    model.start_review(language_prior_groups=["original", "hungarian", "greek"], language_prior_coef=1.0)
    review(model, rows, steps)
    return {"layers": layers, "similarity": similarity, "fitted": fitted, "reviewed": recognised(model, test_rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", type=Path, default=Path("build/demo/inputs"), help="made by examples/demo_inputs.py"
    )
    parser.add_argument("--steps", type=int, default=10, help="of the review")
    parser.add_argument("--tokens", type=int, default=5000, help="of each language, to fit and train gates")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    arguments = parser.parse_args()
    if not (arguments.inputs / "text").is_dir():
        print(
            f"skipped: no text in {arguments.inputs}; make it with examples/demo_inputs.py --output build/demo/inputs"
        )
        return
    started = time.perf_counter()
    results = gates(arguments.inputs, arguments.steps, arguments.tokens)
    print_table(
        f"Share of held-out tokens of SmolLM2-135M that a gate takes for English: fitted; after a review (targets: "
        f"English {RECOGNISED}, others {1 - RECOGNISED:.2f})",
        ("layer", *CODES),
        [
            (layer, *(f"{v:.1%}; {results['reviewed'][layer][c]:.1%}" for c, v in found.items()))
            for layer, found in results["fitted"].items()
        ],
    )
    if arguments.output is not None:
        results |= {"conditions": conditions(), "seconds": round(time.perf_counter() - started)}
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
