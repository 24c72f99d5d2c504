"""Lifelong expansion on real text: a language added a year later, and what that costs the ones that were there.

A small Llama is pre-trained here on English, becomes a learned mixture with an expert for Hungarian, and then learns
Greek in three ways: as this library grows an adapter; the same with the expansion under learned routing, too; and the
published way (LayerMoE, arXiv 2505.22582), which initialises the whole router anew and protects English alone. Then
its routers are reviewed with classifiers on the two layers where languages look most alike.

Bits per byte of held-out text without telling the model any language, with what it moved by; shares of held-out tokens
that the classifiers sent where they should.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import print_table
from peft import PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.routing import most_similar_layers

ENGLISH, HUNGARIAN, GREEK = "en", "hu", "el"
VOCABULARY, ROWS, LENGTH = 4096, 16, 64
SHAPE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
GATES = 2
WAYS: dict[str, dict[str, bool]] = {
    "ours": {},
    "ours, expanded under learned routing": {"hard": False},
    "published": {"hard": False, "published": True},
}
Text = Mapping[str, list[str]]


def read(folder: Path, part: str) -> dict[str, list[str]]:
    """Documents of a part (train, test) by language."""
    files = {code: folder / f"{code}.{part}.jsonl" for code in (ENGLISH, HUNGARIAN, GREEK)}
    return {c: [json.loads(line)["text"] for line in f.open(encoding="utf-8")] for c, f in files.items()}


def make_tokenizer(text: Text) -> PreTrainedTokenizerFast:
    """Byte-level BPE of all three languages: the vocabulary does not grow here."""
    bpe = ByteLevelBPETokenizer()
    documents = [document for documents in text.values() for document in documents]
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")


def rows_of(tokenizer: PreTrainedTokenizerFast, text: Text, seed: int) -> dict[str, Tensor]:
    """Shuffled rows of `LENGTH` tokens by language, (N, LENGTH)."""
    rows = {}
    for code, documents in text.items():
        shuffled = random.Random(seed).sample(documents, len(documents))
        encoded = tokenizer(shuffled, verbose=False)["input_ids"]
        tokens = torch.tensor([t for ids in encoded for t in [*ids, tokenizer.eos_token_id]])
        found = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        rows[code] = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]
    return rows


def train(
    model: nn.Module, rows: Mapping[str, Tensor], codes: Sequence[str], steps: int, rate: float, label: str
) -> None:
    """AdamW with a cosine over equally many rows of each language a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    each = ROWS // len(codes)
    table = model.active_peft_config.language_table if isinstance(model, PeftModel) else None
    model.train()
    for step in tqdm(range(steps), desc=label, disable=None):
        picked = {c: rows[c][[(step * each + i) % len(rows[c]) for i in range(each)]] for c in codes}
        batch: dict[str, Tensor] = {"input_ids": torch.cat(list(picked.values()))}
        if table is not None:
            batch["language_ids"] = torch.tensor([table.id_of(c) for c in codes]).repeat_interleave(each)
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def score(model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: Text, limit: int = 20_000) -> dict[str, float]:
    """Bits per byte by language; the model is not told which."""
    scores = {}
    for code, documents in text.items():
        kept: list[str] = []
        for document in documents:
            if sum(map(len, kept)) < limit:
                kept.append(document)
        scores[code] = bits_per_byte(model, tokenizer, kept, max_length=256, stride=256, batch_size=8).value
    return scores


@torch.no_grad()
def mlp_inputs(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """What each layer's MLP receives, (T, D) each."""
    seen: list[Tensor] = []
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    hooks = [mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))) for mlp in mlps]
    model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def similarity(model: nn.Module, rows: Mapping[str, Tensor]) -> list[float]:
    """LayerMoE's similarity of each layer: mean cosine of token pairs, averaged over new-new and new-original pairs."""
    means = {
        code: [nn.functional.normalize(x, dim=-1).mean(0) for x in mlp_inputs(model, r[:64])]
        for code, r in rows.items()
    }
    pairs = [(HUNGARIAN, GREEK), (HUNGARIAN, ENGLISH), (GREEK, ENGLISH)]
    return [
        sum(w * float(means[a][i] @ means[b][i]) for w, (a, b) in zip((0.5, 0.25, 0.25), pairs, strict=True))
        for i in range(SHAPE["num_hidden_layers"])
    ]


def recognised(model: PeftModel, rows: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Gate layer -> share of each language's held-out tokens that the gate takes for original ones."""
    opened = model.active_peft_config.open_steps
    inputs = {code: mlp_inputs(model, r) for code, r in rows.items()}
    return {
        str(layer): {code: gate.recognises(x[layer], opened).float().mean().item() for code, x in inputs.items()}
        for layer, module in model.layers().items()
        if (gate := module.classifier("default")) is not None
    }


def grow(
    model: PeftModel, rows: Mapping[str, Tensor], steps: int, *, hard: bool = True, published: bool = False
) -> None:
    """Greek, in one of the ways."""
    model.add_languages({GREEK: "greek"}, {"greek": 1})
    if published:
        for layer in model.layers().values():
            router = layer.router("default")
            fresh = nn.init.xavier_normal_(torch.empty_like(router.rows))
            for rows_, part in zip(
                fresh.split([p.shape[0] for p in router.parameters()]), router.parameters(), strict=True
            ):
                part.data.copy_(rows_)
    model.start_expansion(routing="language" if hard else "learned", train_earlier_rows=published)
    train(model, rows, [GREEK], steps, 2e-3, "expansion, Greek")
    if published:
        model.start_review(routing="learned", train_earlier_rows=True, language_prior_groups=["original"])
    else:
        groups = list(model.active_peft_config.group_order)
        model.start_review(routing="learned", language_prior_groups=groups, language_prior_coef=1.0)
    train(model, rows, [ENGLISH, HUNGARIAN, GREEK], steps // 3, 1e-2, "review")


def run(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Everything; figures by name."""
    torch.manual_seed(seed)
    started = time.time()
    text, held_out = read(folder, "train"), read(folder, "test")
    tokenizer = make_tokenizer(text)
    rows, test_rows = rows_of(tokenizer, text, seed), rows_of(tokenizer, held_out, seed)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=0, bos_token_id=0, pad_token_id=0, **SHAPE))
    train(base, rows, [ENGLISH], 2 * steps, 3e-3, "pre-training, English")
    scores = {"base": score(base, tokenizer, held_out)}

    measured = similarity(base, rows)
    config = MoeDeltaConfig(
        languages={ENGLISH: "original", HUNGARIAN: "hungarian"},
        experts={"hungarian": 1},
        routing="language",
        classifier_layers=most_similar_layers(measured, count=GATES),
    )
    model = get_peft_model(base, config)
    train(model, rows, [HUNGARIAN], steps, 2e-3, "expansion, Hungarian")
    model.start_review(routing="learned", language_prior_groups=["original", "hungarian"], language_prior_coef=1.0)
    train(model, rows, [ENGLISH, HUNGARIAN], steps // 3, 1e-2, "review")
    scores["before"] = score(model, tokenizer, held_out)

    grown = {}
    for way, options in WAYS.items():
        torch.manual_seed(seed + 1)
        grown[way] = copy.deepcopy(model)
        grow(grown[way], rows, steps, **options)
        scores[way] = score(grown[way], tokenizer, held_out)

    gated = grown["ours"]
    groups = list(gated.active_peft_config.group_order)
    gated.start_review(
        routing="classifier", language_prior_groups=groups, language_prior_coef=1.0, train_earlier_rows=True
    )
    train(gated, rows, [ENGLISH, HUNGARIAN, GREEK], steps // 3, 1e-2, "review with classifiers")
    scores["ours, with classifiers"] = score(gated, tokenizer, held_out)
    return {
        "bits_per_byte": scores,
        "similarity": measured,
        "recognised_as_original": recognised(gated, test_rows),
        "parameters": sum(p.numel() for p in model.get_base_model().parameters()),
        "steps": steps,
        "seed": seed,
        "seconds": round(time.time() - started),
    }


def show(results: Mapping[str, Any]) -> None:
    """The two tables."""
    scores = results["bits_per_byte"]
    before = scores["before"]
    print_table(
        "Bits per byte of held-out text, no language told, and what it moved by as Greek was added",
        ("", ENGLISH, HUNGARIAN, GREEK),
        [
            (
                name,
                *(
                    f"{v:.3f}" + (f" ({v - before[c]:+.3f})" if name not in ("base", "before") else "")
                    for c, v in row.items()
                ),
            )
            for name, row in scores.items()
        ],
    )
    print_table(
        "Share of held-out tokens that a gate keeps on expert 0",
        ("layer", ENGLISH, HUNGARIAN, GREEK),
        [(layer, *(f"{v:.1%}" for v in row.values())) for layer, row in results["recognised_as_original"].items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, default=Path("build/demo/inputs/text"), help="from examples/demo_inputs.py"
    )
    parser.add_argument(
        "--steps", type=int, default=240, help="of an expansion; pre-training takes twice, a review a third"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "growing.json")
    arguments = parser.parse_args()
    results = run(arguments.text, arguments.steps, arguments.seed)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
