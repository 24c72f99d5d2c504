"""Mixing on real text: three languages branch from one seed and are mixed, with and without attention experts.

    python examples/demo_inputs.py --output build/demo/inputs          # the text
    python tests/benchmarks/bench_mixing.py --output tests/benchmarks/results/mixing.json

For each random seed, from nothing: a Llama of 2.4 million parameters is pre-trained on English, Hungarian and Greek;
three branches continue it, one a language; they are mixed, everything outside of experts averaged, and trained on all
languages for the same number of tokens: MLP experts only (BTX), attention experts with shared keys and values, and
with their own (BAM). The dense model continues the seed on all data, on as many tokens as branches and mixture took
together. Experts and routers train in the mixtures; MLP routing is top-2 in all of them, so that attention is all they
differ in.

Published order (BAM, arXiv 2408.08274): full <= shared_kv <= BTX in loss. Each step of it is confirmed or refuted where
the 95% t-interval over seeds of the difference in bits per byte, mean over languages, lies on one side of 0.

And without training (DUME, arXiv 2603.29765): the same branches over the seed, routers fitted in closed form on
training text, top-1; on test text, the share of tokens on their language's expert, and bits per byte beside forced
routing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
import torch
from learning import cosine, interval, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_moe_delta import fit_routers, mix
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.tuner import MoeDeltaLayer

LANGUAGES = ("en", "hu", "el")
VOCABULARY, ROW, BATCH = 4096, 128, 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
STEPS = {"seed": 120, "branch": 60, "mixture": 36}
"""Optimizer steps of BATCH x ROW tokens."""
MIXTURES: dict[str, dict[str, Any]] = {
    "BTX": {},
    "shared_kv": {"attention_experts": "shared_kv"},
    "full": {"attention_experts": "full"},
}
STEPS_OF_THE_ORDER = (("full", "shared_kv"), ("shared_kv", "BTX"), ("full", "BTX"), ("full", "dense"))
PERCENT_OWN, PERCENT_WORSE = 95.0, 3.0
"""Targets of the closed-form routers."""


def read(folder: Path, code: str, split: str) -> list[str]:
    lines = (folder / f"{code}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def make_tokenizer(texts: Mapping[str, list[str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for documents in texts.values() for text in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")


def batches(streams: Mapping[str, Tensor], steps: int, seed: int, name: bool) -> Iterator[dict[str, Any]]:
    """Random rows; languages take turns. `name`: say which they are."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        codes = [list(streams)[(step * BATCH + row) % len(streams)] for row in range(BATCH)]
        starts = [int(torch.randint(len(streams[code]) - ROW, (), generator=generator)) for code in codes]
        tokens = torch.stack([streams[c][s : s + ROW] for c, s in zip(codes, starts, strict=True)])
        yield {"input_ids": tokens, "labels": tokens, "use_cache": False, **({"language": codes} if name else {})}


def fit(model: nn.Module, streams: Mapping[str, Tensor], steps: int, rate: float, seed: int) -> None:
    """AdamW with a cosine schedule."""
    rows = batches(streams, steps, seed, name=hasattr(model, "peft_config"))
    train(model, rows, rate, cosine(steps), steps=steps, betas=(0.9, 0.95), weight_decay=0.01)


def score(model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Mapping[str, list[str]], name: bool = False):
    """Bits per byte of each language; `name`: tell the model which it is."""
    return {
        code: bits_per_byte(
            model, tokenizer, documents, max_length=ROW, stride=ROW, batch_size=16, language=code if name else None
        ).value
        for code, documents in texts.items()
    }


def shares_on_own_expert(model: Any, tokenizer: PreTrainedTokenizerFast, texts: Mapping[str, list[str]]) -> list[float]:
    """For each layer, mean over languages of the share of tokens whose first choice is their language's expert."""
    layers = [module for module in model.modules() if type(module) is MoeDeltaLayer]
    right, total = torch.zeros(len(layers), len(texts)), torch.zeros(len(texts))
    for column, (code, documents) in enumerate(texts.items()):
        own = model.active_peft_config.record.group_order.index(code)

        def count(router: nn.Module, args: Any, logits: Tensor, index: int, own: int = own, column: int = column):
            right[index, column] += (logits.argmax(-1) == own).sum()

        handles = [
            layer.moe_delta_router["default"].register_forward_hook(lambda *a, index=i, count=count: count(*a, index))
            for i, layer in enumerate(layers)
        ]
        for document in documents:
            for row in tokenizer(document, return_tensors="pt")["input_ids"].split(ROW, dim=1):
                total[column] += row.numel()
                with torch.no_grad():
                    model(input_ids=row, use_cache=False)
        for handle in handles:
            handle.remove()
    return (right / total).mean(dim=1).tolist()


def run(seed: int, text: Mapping[str, dict[str, list[str]]], tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Everything from one random seed."""
    torch.manual_seed(seed)
    streams = {
        code: torch.tensor([t for d in documents for t in (*tokenizer(d)["input_ids"], 0)])
        for code, documents in text["train"].items()
    }
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    fit(base, streams, STEPS["seed"], 2e-3, 10 * seed)
    paths = {name: folder / f"{seed}-{name}" for name in ("seed", *LANGUAGES)}
    for code, path in paths.items():
        branch = LlamaForCausalLM(base.config)
        branch.load_state_dict(base.state_dict())
        if code != "seed":
            fit(branch, {code: streams[code]}, STEPS["branch"], 1e-3, 10 * seed + 1)
        branch.save_pretrained(path)
        tokenizer.save_pretrained(path)
    branches = {code: paths[code] for code in LANGUAGES}
    found: dict[str, Any] = {"seed": score(base, tokenizer, text["test"])}

    fit(base, streams, len(LANGUAGES) * STEPS["branch"] + STEPS["mixture"], 1e-3, 10 * seed + 2)
    found["dense"] = score(base, tokenizer, text["test"])
    for name, options in MIXTURES.items():
        torch.manual_seed(seed)
        output = folder / f"{seed}-{name}-base"
        model = mix(paths["seed"], branches, others="average", base_output=output, **options)
        fit(model, streams, STEPS["mixture"], 1e-3, 10 * seed + 3)
        found[name] = score(model, tokenizer, text["test"])

    model = mix(paths["seed"], branches, top_k=1)
    fit_routers(model, text["train"], tokenizer, max_length=ROW)
    shares = shares_on_own_expert(model, tokenizer, text["test"])
    found["closed form"] = score(model, tokenizer, text["test"])
    model.active_peft_config.routing = "language"
    found["forced"] = score(model, tokenizer, text["test"], name=True)
    return {"bits_per_byte": found, "share_on_own_expert": shares}


def verdict(runs: list[dict[str, Any]], better: str, worse: str) -> dict[str, Any]:
    """Whether `better` needs fewer bits than `worse`, from the differences of each random seed."""
    differences = [
        statistics.mean(r["bits_per_byte"][better][c] - r["bits_per_byte"][worse][c] for c in LANGUAGES) for r in runs
    ]
    claim = {"claim": f"{better} <= {worse}", "mean": statistics.mean(differences)}
    if len(runs) == 1:
        return {**claim, "interval": None, "verdict": "undecided"}
    found = interval(differences)
    word = "confirmed" if found["high"] <= 0 else "refuted" if found["low"] > 0 else "undecided"
    return {**claim, "interval": [found["low"], found["high"]], "verdict": word}


def closed_form(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The two figures of closed-form routers that have a target: the worst over languages and random seeds."""
    layers = SHAPE["num_hidden_layers"]
    middle = range(layers // 4, layers - layers // 4)
    worse = max(
        100 * (r["bits_per_byte"]["closed form"][c] / r["bits_per_byte"]["forced"][c] - 1)
        for r in runs
        for c in LANGUAGES
    )
    own = min(100 * r["share_on_own_expert"][layer] for r in runs for layer in middle)
    return {"middle_layers": list(middle), "percent_on_own_expert": own, "percent_worse_than_forced": worse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("build/demo/inputs/text"), help="made by demo_inputs.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="share of the optimizer steps, for a quick look")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    arguments = parser.parse_args()
    STEPS.update({name: max(1, round(arguments.share * steps)) for name, steps in STEPS.items()})
    if not arguments.text.is_dir():
        print(f"skipped: no text in {arguments.text}; make it with examples/demo_inputs.py --output build/demo/inputs")
        return
    start = time.perf_counter()
    text = {split: {c: read(arguments.text, c, split) for c in LANGUAGES} for split in ("train", "test")}
    tokenizer = make_tokenizer(text["train"])
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, text, tokenizer, Path(folder)) for seed in range(arguments.seeds)]
    names = list(runs[0]["bits_per_byte"])
    rows = []
    for name in names:
        values = [[r["bits_per_byte"][name][c] for r in runs] for c in LANGUAGES]
        rows.append((name, *(f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values)))
    measure.print_table(
        f"Bits per byte on test text: mean over {len(runs)} random seeds (range)", ("", *LANGUAGES), rows
    )
    verdicts = [verdict(runs, *pair) for pair in STEPS_OF_THE_ORDER]
    for v in verdicts:
        interval = "one random seed" if v["interval"] is None else "[{:+.4f}, {:+.4f}]".format(*v["interval"])
        print(f"- {v['claim']}: {v['mean']:+.4f} {interval}, {v['verdict']}")
    fitted = closed_form(runs)
    own, worse = fitted["percent_on_own_expert"], fitted["percent_worse_than_forced"]
    print(
        f"- closed-form routers: {own:.1f}% of tokens on their language's expert in layers {fitted['middle_layers']} "
        f"(target {PERCENT_OWN:.0f}), {worse:+.2f}% bits per byte against forced routing (target {PERCENT_WORSE:.0f})"
    )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "conditions": measure.conditions(), "seconds": round(time.perf_counter() - start), "shape": SHAPE,
            "steps": STEPS, "tokens_a_step": ROW * BATCH, "verdicts": verdicts, "closed_form": fitted, "runs": runs,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
