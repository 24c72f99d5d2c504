"""Lifelong expansion on real text: languages added one after another, and what that costs the ones that were there.

    python examples/demo_inputs.py --output build/demo/inputs --also en tr ru      # the text, and a model
    python tests/benchmarks/bench_growing.py

A small Llama is pre-trained here on English with a little of everything else, becomes a learned mixture with an expert
for Hungarian, and then learns Greek, Turkish and Russian, one after another, in two ways: as this library grows an
adapter, and the published way (LayerMoE, arXiv 2505.22582), which initialises the whole router anew, expands under it
and protects English alone. Bits per byte of held-out text without telling the model any language, with what an
insertion moved the earlier ones by; under routing by language, whether their logits are bit-equal.

Then the classifiers, on the hidden states of a real model: SmolLM2-135M, on the layers where languages look most alike,
the shares of held-out tokens that each gate takes for English, as fitted in closed form and as trained in a review.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from learning import cosine, train
from measure import conditions, print_table
from peft import PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from peft_moe_delta import MoeDeltaConfig, fit_routers
from peft_moe_delta.allocation import Measurement, measure_languages
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.mixing import EARLIER_WEIGHT
from peft_moe_delta.routing import most_similar_layers
from peft_moe_delta.tuner import MoeDeltaLayer

ENGLISH, HUNGARIAN, GREEK = "en", "hu", "el"
INSERTED = {GREEK: "greek", "tr": "turkish", "ru": "russian"}
VOCABULARY, ROWS, LENGTH = 4096, 10, 128
SHAPE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
WAYS = ("ours", "published")
EXPANSION_RATE = 4e-3
GATES = 4
MOST_MOVED, RECOGNISED = 0.02, 0.95
"""Targets: bits per byte of an earlier language at an insertion; tokens that a gate sends where they belong."""
Text = Mapping[str, list[str]]


def read(inputs: Path, part: str) -> dict[str, list[str]]:
    """Documents of a part (train, test) by language: those of the demo, then those of `--also` that are there.

    English is Wikipedia and interface text in training; held out, it is both in turn, where both are there.
    """
    documents: dict[str, list[str]] = {}
    for code in (ENGLISH, HUNGARIAN, *INSERTED):
        files = [f for f in (inputs / "text" / f"{code}.{part}.jsonl", inputs / "more_text" / code / f"{part}.jsonl")]
        found = [[json.loads(line)["text"] for line in f.open(encoding="utf-8")] for f in files if f.is_file()]
        kept = found if code == ENGLISH and part == "test" else found[:1]
        if found:
            documents[code] = [d for d in chain.from_iterable(zip_longest(*kept)) if d is not None]
    return documents


def make_tokenizer(text: Text) -> PreTrainedTokenizerFast:
    """Byte-level BPE of all languages: the vocabulary does not grow here."""
    bpe = ByteLevelBPETokenizer()
    documents = [document for documents in text.values() for document in documents]
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")


def rows_of(tokenizer: PreTrainedTokenizerBase, text: Text, seed: int, limit: int | None = None) -> dict[str, Tensor]:
    """Shuffled rows of `LENGTH` tokens by language, (N, LENGTH)."""
    rows = {}
    for code, documents in text.items():
        shuffled = random.Random(seed).sample(documents, len(documents))[:limit]
        encoded = tokenizer(shuffled, verbose=False)["input_ids"]
        tokens = torch.tensor([t for ids in encoded for t in [*ids, tokenizer.eos_token_id]])
        found = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        rows[code] = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]
    return rows


def mostly_english(rows: Mapping[str, Tensor], steps: int) -> Tensor:
    """`ROWS` rows a step: nine tenths English, a tenth of the other languages in turn."""
    others = [code for code in rows if code != ENGLISH]
    picked = []
    for i in range(steps * ROWS):
        code, at = (others[i // 10 % len(others)], i // 10 // len(others)) if i % 10 == 9 else (ENGLISH, i - i // 10)
        picked.append(rows[code][at % len(rows[code])])
    return torch.stack(picked)


def learn(
    model: nn.Module,
    rows: Mapping[str, Tensor],
    codes: Sequence[str],
    steps: int,
    rate: float,
    label: str,
    *,
    newest: str | None = None,
) -> None:
    """Train on equally many rows of each language a step.

    But for a `newest`, of which there are as many fewer as `fit_routers` weighs it less.
    """
    weights = {c: 1.0 if c == newest or newest is None else EARLIER_WEIGHT for c in codes}
    each = {c: int(ROWS * weight / sum(weights.values())) for c, weight in weights.items()}
    arguments: dict[str, Any] = {"use_cache": False}
    if isinstance(model, PeftModel):
        table = model.active_peft_config.language_table
        arguments["language_ids"] = torch.tensor([table.id_of(c) for c, n in each.items() for _ in range(n)])

    def batches() -> Iterator[dict[str, Any]]:
        for step in range(steps):
            ids = torch.cat([rows[c][[(step * n + i) % len(rows[c]) for i in range(n)]] for c, n in each.items()])
            yield {"input_ids": ids, "labels": ids, **arguments}

    schedule = cosine(steps, warm_up=max(1, steps // 10), floor=0.0)
    train(model, batches(), rate, schedule, steps=steps, label=label, weight_decay=0.01)


def score(model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: Text, limit: int = 20_000) -> dict[str, float]:
    """Bits per byte by language; the model is not told which."""
    return {
        code: bits_per_byte(model, tokenizer, head(documents, limit), max_length=LENGTH, stride=LENGTH).value
        for code, documents in text.items()
    }


def head(documents: Sequence[str], limit: int) -> list[str]:
    """The first documents, up to a number of characters."""
    kept: list[str] = []
    for document in documents:
        if sum(map(len, kept)) < limit:
            kept.append(document)
    return kept


@torch.no_grad()
def told(model: PeftModel, rows: Mapping[str, Tensor], codes: Sequence[str]) -> dict[str, Tensor]:
    """Logits of some held-out rows under routing by language."""
    with model.base_model.in_routing("language"):
        return {code: model(input_ids=rows[code][:4], language=code, use_cache=False).logits for code in codes}


# -- growing ----------------------------------------------------------------------------------------------------------


def insert(model: PeftModel, way: str, code: str, rows: Mapping[str, Tensor], tokenizer: Any, steps: int) -> None:
    """One language more, in one of the ways."""
    model.add_languages({code: INSERTED[code]}, {INSERTED[code]: 1})
    known = list(model.active_peft_config.languages)
    if way == "published":
        for layer in model.layers().values():
            parts = list(layer.router("default").parameters())
            fresh = nn.init.xavier_normal_(torch.empty_like(layer.router("default").rows))
            for part, initial in zip(parts, fresh.split([len(p) for p in parts]), strict=True):
                part.data.copy_(initial)
        model.start_expansion(routing="learned", train_earlier_rows=True)
        learn(model, rows, [code], steps, EXPANSION_RATE, f"{way}: expansion, {code}")
        model.start_review(train_earlier_rows=True, language_prior_groups=["original"])
    else:
        model.start_expansion(routing="language")
        learn(model, rows, [code], steps, EXPANSION_RATE, f"{way}: expansion, {code}")
        groups = list(model.active_peft_config.record.group_order)
        model.start_review(routing="learned", language_prior_groups=groups, language_prior_coef=1.0)
        fit_routers(model, documents(tokenizer, rows, known), tokenizer, only="newest", max_length=LENGTH)
    rate, newest = (1e-2, None) if way == "published" else (1e-3, code)
    learn(model, rows, known, review_steps(steps), rate, f"{way}: review", newest=newest)


def documents(tokenizer: Any, rows: Mapping[str, Tensor], codes: Sequence[str], number: int = 200) -> Text:
    """Training rows as text, for `fit_routers`."""
    return {code: tokenizer.batch_decode(rows[code][:number]) for code in codes}


def review_steps(steps: int) -> int:
    """How long a review is beside an expansion."""
    return max(1, steps * 3 // 5)


def growing(inputs: Path, steps: int, seed: int) -> dict[str, Any]:
    """Figures of one seed by name."""
    torch.manual_seed(seed)
    text, held_out = read(inputs, "train"), read(inputs, "test")
    tokenizer = make_tokenizer(text)
    rows, test_rows = rows_of(tokenizer, text, seed), rows_of(tokenizer, held_out, seed)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=0, bos_token_id=0, pad_token_id=0, **SHAPE))
    learn(base, {"base": mostly_english(rows, 7 * steps)}, ["base"], 7 * steps, 3e-3, "pre-training")
    scores = {"base": score(base, tokenizer, held_out)}

    languages = {ENGLISH: "original", HUNGARIAN: "hungarian"}
    model = get_peft_model(base, MoeDeltaConfig(languages=languages, experts={"hungarian": 1}, routing="language"))
    learn(model, rows, [HUNGARIAN], steps, EXPANSION_RATE, "expansion, hu")
    model.start_review(routing="learned", language_prior_groups=["original", "hungarian"], language_prior_coef=1.0)
    learn(model, rows, [ENGLISH, HUNGARIAN], review_steps(steps), 1e-2, "review")
    scores["en, hu"] = score(model, tokenizer, held_out)

    equal = True
    for way in WAYS:
        grown, known = copy.deepcopy(model), [ENGLISH, HUNGARIAN]
        for code in (c for c in INSERTED if c in text):
            torch.manual_seed(seed + 1)
            before = told(grown, test_rows, known)
            insert(grown, way, code, rows, tokenizer, steps)
            if way == "ours":
                after = told(grown, test_rows, known)
                equal = equal and all(torch.equal(after[c], before[c]) for c in known)
            known.append(code)
            scores[f"{way}, + {code}"] = score(grown, tokenizer, held_out)
    parameters = sum(p.numel() for n, p in base.named_parameters() if "moe_delta_" not in n)
    return {"seed": seed, "steps": steps, "parameters": parameters, "bits_per_byte": scores, "told_bit_equal": equal}


def moved(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Way and language -> by how much its insertion moved each language that was there, and itself."""
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        before, known = scores["en, hu"], [ENGLISH, HUNGARIAN]
        for name in (n for n in scores if n.startswith(f"{way}, + ")):
            known = [*known, name.removeprefix(f"{way}, + ")]
            found[name] = {code: scores[name][code] - before[code] for code in known}
            before = scores[name]
    return found


# -- classifiers ------------------------------------------------------------------------------------------------------


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


def classifiers(inputs: Path, steps: int, tokens: int, seed: int) -> dict[str, Any]:
    """Gates on the layers of a real model where languages look most alike."""
    torch.manual_seed(seed)
    codes = (ENGLISH, HUNGARIAN, GREEK)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    text, held_out = ({code: read(inputs, part)[code] for code in codes} for part in ("train", "test"))
    rows = {code: found[: -(-tokens // LENGTH)] for code, found in rows_of(tokenizer, text, seed).items()}
    test_rows = {code: found[: -(-tokens // LENGTH // 2)] for code, found in rows_of(tokenizer, held_out, seed).items()}
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
    fit_routers(model, documents(tokenizer, rows, codes), tokenizer, only="gates", max_length=LENGTH)
    fitted = recognised(model, test_rows)
    model.start_review(language_prior_groups=["original", "hungarian", "greek"], language_prior_coef=1.0)
    learn(model, rows, codes, steps, 2e-3, "gates")
    return {"layers": layers, "similarity": similarity, "fitted": fitted, "reviewed": recognised(model, test_rows)}


# -- everything -------------------------------------------------------------------------------------------------------


def show(results: Mapping[str, Any]) -> None:
    """The tables."""
    for found in results["growing"]:
        scores, moves = found["bits_per_byte"], moved(found["bits_per_byte"])
        codes = list(scores["base"])
        print_table(
            f"Bits per byte, no language told, and what each insertion moved it by (seed {found['seed']})",
            ("", *codes),
            [
                (name, *(f"{v:.3f}" + (f" ({moves[name][c]:+.3f})" if c in moves.get(name, {}) else "")
                         for c, v in row.items()))
                for name, row in scores.items()
            ],
        )  # fmt: skip
        print(f"- earlier languages bit-equal under routing by language: {found['told_bit_equal']}")
        for way in WAYS:
            moved_most = max((v for n, m in moves.items() if n.startswith(way) for v in list(m.values())[:-1]), key=abs)
            print(f"- {way}: an insertion moves an earlier language by up to {moved_most:+.3f} (target {MOST_MOVED})")
    if gates := results.get("classifiers"):
        print_table(
            f"Share of held-out tokens of SmolLM2-135M that a gate takes for English: fitted; after a review (targets: "
            f"English {RECOGNISED}, others {1 - RECOGNISED:.2f})",
            ("layer", *next(iter(gates["fitted"].values()))),
            [
                (layer, *(f"{v:.1%}; {gates['reviewed'][layer][c]:.1%}" for c, v in row.items()))
                for layer, row in gates["fitted"].items()
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", type=Path, default=Path("build/demo/inputs"), help="made by examples/demo_inputs.py"
    )
    parser.add_argument(
        "--steps", type=int, default=90, help="of an expansion; pre-training takes 7 times, a review 3 fifths"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--gate-steps", type=int, default=10, help="review steps of the classifiers; 0 leaves them out")
    parser.add_argument("--gate-tokens", type=int, default=5000, help="of each language, to fit and train gates")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    arguments = parser.parse_args()
    if not (arguments.inputs / "text").is_dir():
        print(
            f"skipped: no text in {arguments.inputs}; make it with examples/demo_inputs.py --output build/demo/inputs"
        )
        return
    started = time.perf_counter()
    results: dict[str, Any] = {}
    if arguments.gate_steps:
        results["classifiers"] = classifiers(arguments.inputs, arguments.gate_steps, arguments.gate_tokens, seed=0)
    results["growing"] = [growing(arguments.inputs, arguments.steps, seed) for seed in range(arguments.seeds)]
    results |= {"conditions": conditions(), "seconds": round(time.perf_counter() - started)}
    show(results)
    if arguments.output is not None:
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
