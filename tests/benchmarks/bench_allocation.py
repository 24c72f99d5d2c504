"""Does it matter where the experts are? An inverse-similarity plan with half the experts against the uniform plan.

A model of 2.5 million parameters is pre-trained here on English interface text, byte by byte. Then, for each of three
seeds, Hungarian, Greek and Turkish are learnt by plans with the same tokens in the same order: uniform, inverse
similarity with half its experts, and uniform with that half, which tells the plan's shape from its size. Bits per byte
of held-out text, means over seeds with 95% t-intervals, and paired differences.

    python examples/demo_inputs.py --output build/demo/inputs --also en hu el tr
    python tests/benchmarks/bench_allocation.py --json tests/benchmarks/results/allocation.json
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from learning import interval, linear, train
from measure import conditions, keep_memory
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_moe_delta import ExpertPlan, MoeDeltaConfig, allocate_experts
from peft_moe_delta.allocation import Measurement, measure_languages
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.sources import read_texts

LANGUAGES = {"en": "original", "hu": "expanded", "el": "expanded", "tr": "expanded"}
NEW = [code for code, group in LANGUAGES.items() if group != "original"]
SHAPE = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 8, "num_attention_heads": 5}
UNIFORM, INVERSE, HALF = "uniform", "inverse similarity, half the experts", "uniform, half the experts"
BATCH, LENGTH = 8, 256
SEEDS = (0, 1, 2)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


class Corpus:
    """Training bytes and held-out documents of each language."""

    def __init__(self, folder: Path, test_bytes: int) -> None:
        self.tokenizer = byte_tokenizer()
        self.texts = {code: read_texts(str(folder / code / "train.jsonl")) for code in LANGUAGES}
        self.test = {code: read_texts(str(folder / code / "test.jsonl"), test_bytes) for code in LANGUAGES}
        self.ids = {
            code: torch.tensor(self.tokenizer("\n".join(texts), verbose=False)["input_ids"])
            for code, texts in self.texts.items()
        }

    def batches(self, codes: Sequence[str], steps: int, seed: int, *, name: bool = True) -> Iterator[dict[str, Tensor]]:
        """Batches of rows that begin anywhere, each row of one of the languages in turn; `name`: say of which."""
        rng, known = random.Random(seed), list(LANGUAGES)
        for step in range(steps):
            row_codes = [codes[(step * BATCH + row) % len(codes)] for row in range(BATCH)]
            starts = [rng.randrange(len(self.ids[code]) - LENGTH) for code in row_codes]
            rows = [self.ids[code][start : start + LENGTH] for code, start in zip(row_codes, starts, strict=True)]
            ids = torch.stack(rows)
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            languages = torch.tensor([known.index(code) for code in row_codes])
            yield {**batch, "language_ids": languages} if name else batch


def fit(model: nn.Module, batches: Iterator[dict[str, Tensor]], steps: int, rate: float, what: str) -> None:
    """AdamW, falling linearly to 0."""
    train(model, batches, rate, linear(steps), steps=steps, label=what, fused=True)


def scores(model: nn.Module, corpus: Corpus) -> dict[str, float]:
    """Bits per byte of each language."""
    options = {"max_length": LENGTH, "stride": LENGTH, "batch_size": 16}
    return {code: bits_per_byte(model, corpus.tokenizer, texts, **options).value for code, texts in corpus.test.items()}


def learn(base: LlamaForCausalLM, plan: ExpertPlan, corpus: Corpus, seed: int, steps: int, what: str) -> nn.Module:
    """Expansion on the new languages, then a short review on all."""
    torch.manual_seed(seed)
    config = MoeDeltaConfig(languages=dict(LANGUAGES), experts=plan)
    model = get_peft_model(copy.deepcopy(base), config)
    fit(model, corpus.batches(NEW, steps, seed), steps, 2e-3, f"{what}, seed {seed}")
    model.start_review()
    fit(model, corpus.batches(list(LANGUAGES), steps // 4, seed + 100), steps // 4, 2e-3, "review")
    return model


def averages(results: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Each seed's average over the new languages, and the original one's score."""
    return {"new": [statistics.mean(r[code] for code in NEW) for r in results], "original": [r["en"] for r in results]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("build/demo/inputs/more_text"), help="folder of the text")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120, help="of expansion; review takes a quarter of them")
    parser.add_argument("--test-bytes", type=int, default=12_000, help="of each language")
    arguments = parser.parse_args()
    if not all((arguments.text / code).is_dir() for code in LANGUAGES):
        print(f"skipped: no text in {arguments.text}. Run examples/demo_inputs.py --also {' '.join(LANGUAGES)}.")
        return
    keep_memory()
    corpus = Corpus(arguments.text, arguments.test_bytes)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(corpus.tokenizer), tie_word_embeddings=True, **SHAPE))
    steps = arguments.pretraining_steps
    fit(base, corpus.batches(["en"], steps, 0, name=False), steps, 3e-3, "pre-training")

    measured = measure_languages(
        base, corpus.tokenizer, corpus.texts, sources=["similarity"], measurement=Measurement(sequence_length=LENGTH)
    )
    layers = SHAPE["num_hidden_layers"]
    plans = {
        UNIFORM: allocate_experts(measured, "uniform", 4 * layers, languages=LANGUAGES),
        INVERSE: allocate_experts(measured, "inverse_similarity", 2 * layers, languages=LANGUAGES),
        HALF: allocate_experts(measured, "uniform", 2 * layers, languages=LANGUAGES),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for seed in SEEDS:
        for name, plan in plans.items():
            results[name].append(scores(learn(base, plan, corpus, seed, arguments.steps, name), corpus))
    report(plans, results, scores(base, corpus), measured.similarity(NEW, ["en"]).tolist(), arguments)


def report(
    plans: dict[str, ExpertPlan],
    results: dict[str, list[dict[str, float]]],
    base: dict[str, float],
    similarity: list[float],
    arguments: argparse.Namespace,
) -> None:
    """Print the tables, write the JSON file."""
    by_plan = {name: averages(runs) for name, runs in results.items()}
    figures = {name: {kind: interval(values) for kind, values in kinds.items()} for name, kinds in by_plan.items()}
    pairs = [(INVERSE, UNIFORM), (INVERSE, HALF), (HALF, UNIFORM)]
    differences = {
        f"{a} - {b}": {
            kind: interval([x - y for x, y in zip(by_plan[a][kind], by_plan[b][kind], strict=True)])
            for kind in ("new", "original")
        }
        for a, b in pairs
    }
    base_averages = averages([base])
    print("\n| bits per byte, lower is better | new experts a layer | new languages | English |\n|---|---|---:|---:|")
    print(f"| base | none | {base_averages['new'][0]:.3f} | {base_averages['original'][0]:.3f} |")
    for name, kinds in figures.items():
        experts = [plans[name].num_experts(layer) - 1 for layer in plans[name].layers]
        print(f"| {name} | {' '.join(map(str, experts))} | {shown(kinds['new'])} | {shown(kinds['original'])} |")
    for name, kinds in differences.items():
        print(f"| {name} | | {decided(kinds['new'])} | {decided(kinds['original'])} |")
    print(f"\n{conditions()}")
    if arguments.json:
        data = {
            "settings": {name: str(value) for name, value in vars(arguments).items()} | {"seeds": SEEDS},
            "similarity": similarity,
            "plans": {name: json.loads(plan.to_json()) for name, plan in plans.items()},
            "base": base,
            "runs": results,
            "averages": figures,
            "differences": differences,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def shown(figure: dict[str, float], sign: str = "") -> str:
    return "{mean:{s}.3f} [{low:{s}.3f}, {high:{s}.3f}]".format(**figure, s=sign)


def decided(figure: dict[str, float]) -> str:
    """A difference, and whether its interval leaves out 0."""
    return shown(figure, "+") + ("" if figure["low"] * figure["high"] > 0 else ", undecided")


if __name__ == "__main__":
    main()
