"""How well routing by context reads languages: on held-out pages of ten languages, by rule, memory and margin.

`python tests/benchmarks/bench_identifier.py` prints, for the tokenizer of the demo's model (SmolLM2):

1. documents of 200 bytes and more that are taken for their own language, of ten that an adapter knows;
2. tokens that are taken for their own language, or left on expert 0, by an adapter for Hungarian and Greek that was
   fitted on the demo's text and reads another domain's: what it knows, and languages that nobody named;
3. tokens after a change of language until the text is followed;
4. the same figures without memory, with other memories, thresholds and margins, and for other rules: evidence that
   is summed up without bounds, and with an exponential memory;
5. the same figures for what a model's states say in place of token counts: the mean over as many tokens of the
   embeddings, or of what the first layer's MLP reads, by least squares. It has no answer for a language that nobody
   named.

It needs the help pages in `../shared/data` and the demo's inputs (`make demo-quick` fetches them), and skips without.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from peft_moe_delta.routing.context import MARGIN, THRESHOLD, UNITS, recognise, token_scores

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT.parent / "shared" / "data" / "libreoffice_help"
INPUTS = ROOT / "build" / "demo" / "inputs"
TEN = ("en", "de", "fr", "es", "hu", "tr", "el", "ru", "ja", "zh")
BYTES, DOCUMENTS, LONGEST, MEMORY = 300_000, 80, 400, 64
FITTED = 100  # documents of a language whose states are looked at
Ids = list[list[int]]


def is_held_out(page: str) -> bool:
    return int(hashlib.sha1(page.encode()).hexdigest(), 16) % 10 == 0


def some(texts: list[str]) -> list[str]:
    """As many as hold `BYTES`."""
    kept, size = [], 0
    for text in texts:
        if size >= BYTES:
            break
        kept.append(text)
        size += len(text.encode())
    return kept


class Text:
    """Pages by language: `train`, of which counts are made, and `test`, of at least 200 bytes each."""

    def __init__(self, tokenizer: object) -> None:
        self.train: dict[str, Ids] = {}
        self.test: dict[str, Ids] = {}
        for code in TEN:
            rows = [json.loads(line) for line in (PAGES / f"{code}.jsonl").read_text("utf-8").splitlines()]
            long = [r["text"] for r in rows if is_held_out(r["id"]) and len(r["text"].encode()) >= 200]
            train = some([r["text"] for r in rows if not is_held_out(r["id"])])
            self.train[code] = tokenizer(train, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
            self.test[code] = tokenizer(long[:DOCUMENTS], add_special_tokens=False)["input_ids"]  # type: ignore[operator]


def counts_of(documents: Ids, vocabulary: int) -> Tensor:
    return torch.bincount(torch.tensor([i for ids in documents for i in ids]), minlength=vocabulary)


def scores_for(train: dict[str, Ids], original: tuple[str, ...], vocabulary: int, margin: float = MARGIN) -> Tensor:
    counts = torch.stack([counts_of(documents, vocabulary) for documents in train.values()])
    return token_scores(counts, [code in original for code in train], margin)


def read(ids: list[int], scores: Tensor, memory: int = MEMORY, threshold: int = THRESHOLD) -> Tensor:
    return recognise(torch.tensor([ids[:LONGEST]]), scores, memory, threshold)[0]


def read_without_bounds(ids: list[int], scores: Tensor, memory: int) -> Tensor:
    """The sum over the last tokens, for comparison."""
    total = F.pad(scores[torch.tensor(ids[:LONGEST])].int().cumsum(0), (0, 0, 1, 0))
    first = (torch.arange(len(total) - 1) + 1 - memory).clamp(min=0)
    most, column = (total[1:] - total[first]).max(-1)
    return (column + 1) * (most > 5 * UNITS)


def read_with_decay(ids: list[int], scores: Tensor, decay: float) -> Tensor:
    """The rule with an exponential memory, for comparison."""
    place = torch.arange(len(ids[:LONGEST]))
    weights = torch.where(place[:, None] >= place, decay ** (place[:, None] - place).clamp(min=0).double(), 0.0)
    most, column = (weights @ scores[torch.tensor(ids[:LONGEST])].double()).max(-1)
    return (column + 1) * (most > THRESHOLD)


def shares(test: dict[str, Ids], known: list[str], rule: object) -> dict[str, float]:
    """Language -> share of tokens on their own experts; on expert 0 for those that nobody named."""
    return {
        code: torch.cat([rule(ids) == (known.index(code) + 1 if code in known else 0) for ids in documents])  # type: ignore[operator]
        .double()
        .mean()
        .item()
        for code, documents in test.items()
    }


def read_from_states(model: LlamaForCausalLM, weights: Tensor, first_layer: bool, ids: list[int]) -> Tensor:
    """The most likely language of each token, original first."""
    return (states(model, ids, first_layer) @ weights).argmax(-1)


@torch.inference_mode()
def states(model: LlamaForCausalLM, ids: list[int], first_layer: bool) -> Tensor:
    """(S, D + 1) mean over the last tokens of the embeddings, or of the first MLP's inputs; and a column of ones."""
    found: list[Tensor] = []
    part = model.model.layers[0].mlp if first_layer else model.model.layers[0]
    hook = part.register_forward_pre_hook(lambda _, given: found.append(given[0][0]))
    model(torch.tensor([ids[:LONGEST]]), logits_to_keep=1)
    hook.remove()
    total = F.pad(found[0].double().cumsum(0), (0, 0, 1, 0))
    first = (torch.arange(len(total) - 1) + 1 - MEMORY).clamp(min=0)
    last = torch.arange(1, len(total))
    return F.pad((total[1:] - total[first]) / (last - first)[:, None], (0, 1), value=1.0)


def fitted_to_states(model: LlamaForCausalLM, train: dict[str, Ids], first_layer: bool) -> Tensor:
    """(D + 1, L) least squares of the language, each language with the same weight."""
    size = model.config.hidden_size + 1
    square, target = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, len(train), dtype=torch.float64)
    for column, documents in enumerate(train.values()):
        rows = torch.cat([states(model, ids, first_layer) for ids in documents[:FITTED]])
        square += rows.T @ rows / len(rows)
        target[:, column] += rows.mean(0)
    return torch.linalg.solve(square + 1e-6 * square.diagonal().mean() * torch.eye(size), target)


def delays(test: dict[str, Ids], known: list[str], scores: Tensor) -> list[int]:
    """Tokens after a change of language, from 64 of one to 64 of the other, until one in the other is read."""
    found = []
    for one, first in test.items():
        for other, second in test.items():
            wanted = known.index(other) + 1 if other in known else 0
            for a, b in zip(first[:20], second[:20], strict=False):
                if one != other and min(len(a), len(b)) >= 192:
                    after = read(a[128:192] + b[128:192], scores)[64:] == wanted
                    found.append(int(after.int().argmax()) if after.any() else 64)
    return sorted(found)


def line(name: str, values: dict[str, float]) -> None:
    print(f"{name:34}" + "".join(f" {code} {value:6.2%}" for code, value in values.items()), flush=True)


def main() -> None:
    if not PAGES.is_dir() or not (INPUTS / "model").is_dir():
        sys.exit(f"skipped: needs {PAGES.name} in ../shared/data and the demo's inputs (make demo-quick)")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(INPUTS / "model")
    text, vocabulary = Text(tokenizer), len(tokenizer)

    known, scores = list(TEN[1:]), scores_for(text.train, ("en",), vocabulary)
    right, wrong = {}, []
    for code, documents in text.test.items():
        wanted = known.index(code) + 1 if code in known else 0
        taken = [int(read(ids, scores).bincount(minlength=len(TEN)).argmax()) for ids in documents]
        right[code] = sum(found == wanted for found in taken) / len(taken)
        wrong += [(code, ids) for ids, found in zip(documents, taken, strict=True) if found != wanted]
    line("1. documents, of ten languages", right)
    print(f"   {len(wrong)} of {sum(map(len, text.test.values()))} were not:")
    for code, ids in wrong:
        print(f"     {code}: {tokenizer.decode(ids[:30])!r}")
    line("   tokens", shares(text.test, known, lambda ids: read(ids, scores)))
    late = delays(text.test, known, scores)
    within = sum(d <= 32 for d in late) / len(late)
    print(
        f"3. changes of language: followed after {median(late)} tokens (median), within 32: {within:.2%} of {len(late)}"
    )

    demo = {}
    for code in ("en", "hu", "el"):
        rows = (INPUTS / "text" / f"{code}.train.jsonl").read_text("utf-8").splitlines()
        demo[code] = tokenizer(some([json.loads(row)["text"] for row in rows]), add_special_tokens=False)["input_ids"]
    known, test = ["hu", "el"], {code: text.test[code] for code in TEN[:8]}
    scores = scores_for(demo, ("en",), vocabulary)
    line("2. tokens, hu and el known", shares(test, known, lambda ids: read(ids, scores)))
    for memory in (1, 16, 32, 128):
        line(f"4. memory {memory}", shares(test, known, lambda ids, memory=memory: read(ids, scores, memory)))
    for nats in (2, 5):
        rule = partial(read, scores=scores, threshold=nats * UNITS)
        line(f"   threshold {nats} nats", shares(test, known, rule))
    for memory in (32, 64):
        rule = partial(read_without_bounds, scores=scores, memory=memory)
        line(f"   without bounds, memory {memory}", shares(test, known, rule))
    for decay in (0.9, 0.95, 0.97):
        line(f"   decay {decay}", shares(test, known, lambda ids, decay=decay: read_with_decay(ids, scores, decay)))
    for margin in (1.0, 2.0, 3.0, 4.0, 99.0):
        other = scores_for(demo, ("en",), vocabulary, margin)
        line(f"   margin {margin:g}", shares(test, known, lambda ids, other=other: read(ids, other)))
    model = LlamaForCausalLM.from_pretrained(INPUTS / "model", num_hidden_layers=1)
    for name, first_layer in (("embeddings", False), ("states of the first layer", True)):
        weights = fitted_to_states(model, demo, first_layer)
        rule = partial(read_from_states, model, weights, first_layer)
        line(f"5. {name}", shares(test, known, rule))


if __name__ == "__main__":
    main()
