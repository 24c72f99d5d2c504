"""Mixing on real text: three languages branch from one seed and are mixed, with and without attention experts.

    python examples/demo_inputs.py --output build/demo/inputs --also en hu el
    python tests/benchmarks/bench_mixing.py --page docs/benchmarks.md

For each random seed, from nothing: a small Llama is pre-trained on English, Hungarian and Greek; three branches
continue it, one a language; they are mixed, everything outside of experts averaged, and trained on all languages,
the same rows in the same order: MLP experts only (BTX), attention experts with shared keys and values, and with
their own (BAM). The dense model continues the seed on the rows that branches and mixture read together, all of its
weights training.

Attention experts are parameters and operations that BTX has not. So there is a plain mixture of the same size: one MLP
expert more, which begins as the mean of the branches and reads no text of its own, and one more for each token. An MLP
is as large here as three attention modules, so that parameters and operations are those of the full form, but for
router rows and attention's scores.

Published order (BAM, arXiv 2408.08274): full <= shared_kv <= BTX in loss.

And without training (DUME, arXiv 2603.29765): the same branches over the seed, routers fitted in closed form on
training text, top-1; on test text, the share of tokens on their language's expert, and bits per byte beside forced
routing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from comparison import Batch, Benchmark, Corpus, Rates, Row, batches, bits, learn, row, tokens
from frontier.family import added, trainable
from frontier.tables import shown, table
from pairs import ENGLISH, LENGTH, ROWS, Making, copy_of, rows_of
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from verdicts import Scores, differences, sentences, values

from peft_moe_delta import fit_routers, mix
from peft_moe_delta.graft.memory import tuner_of
from peft_moe_delta.languages import ORIGINAL_GROUP
from peft_moe_delta.tuner import MoeDeltaLayer

LANGUAGES = (ENGLISH, "hu", "el")
STEPS = {"seed": 120, "branch": 32, "mixture": 30}
"""Of 8 x 96 tokens; a branch's for each language."""
SEED_RATE, BRANCH_RATE, RATES = 4e-3, 1e-3, (1e-3, 3e-3)
"""Of the seed and of branches, which all mixtures share; of mixtures and the dense model, one is chosen for each."""
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
MORE = "more"
"""The group of the further MLP expert."""
MIXTURES: dict[str, dict[str, Any]] = {
    "BTX": {"top_k": 2},
    "BTX, larger": {"top_k": 3},
    "shared_kv": {"top_k": 2, "attention_experts": "shared_kv"},
    "full": {"top_k": 2, "attention_experts": "full"},
}
TITLES = {
    "seed": "seed", "dense": "dense, all data", "BTX": "BTX", "BTX, larger": "BTX of full's size",
    "shared_kv": "BAM, shared_kv", "full": "BAM, full", "closed form": "closed form, no training",
    "forced": "the same, told the language",
}  # fmt: skip
PAIRS = (
    ("full", "shared_kv"), ("shared_kv", "BTX"), ("full", "BTX"), ("full", "BTX, larger"), ("shared_kv", "BTX, larger"),
    ("BTX, larger", "BTX"), ("full", "dense"), ("BTX", "dense"),
)  # fmt: skip
FITTED = 100  # rows of each language that closed-form routers read
PERCENT_OWN, PERCENT_WORSE = 95.0, 3.0
"""Targets of the closed-form routers."""


class Mixing:
    """One random seed under way: the seed's and the branches' checkpoints, and what everybody reads."""

    def __init__(self, corpus: Corpus, seed: int, folder: Path) -> None:
        torch.manual_seed(seed)
        self.corpus, self.seed, self.folder = corpus, seed, folder
        rows = rows_of(corpus.tokenizer, corpus.parts["train"], seed)
        self.branch_text = {code: batches(rows, [code], STEPS["branch"], f"{code} {seed}") for code in LANGUAGES}
        self.mixture_text = batches(rows, LANGUAGES, STEPS["mixture"], f"mixture {seed}")
        self.fitted = {code: corpus.tokenizer.batch_decode(rows[code][:FITTED]) for code in LANGUAGES}
        self.base = Making("llama", shape=SHAPE).new_model(corpus.tokenizer)
        learn(self.base, batches(rows, LANGUAGES, STEPS["seed"], f"seed {seed}"), SEED_RATE)
        self.saved(self.base, "seed")
        branches = [self.branch(code) for code in LANGUAGES]
        self.saved(mean_of(self.base, branches), MORE)

    def branch(self, code: str) -> nn.Module:
        model = copy_of(self.base)
        learn(model, self.branch_text[code], BRANCH_RATE)
        return self.saved(model, code)

    def saved(self, model: Any, name: str) -> nn.Module:
        for part in (model, self.corpus.tokenizer):
            part.save_pretrained(self.folder / name)
        return model

    @property
    def dense_text(self) -> list[Batch]:
        """What branches and mixture read together; languages take turns."""
        return [*chain.from_iterable(zip(*self.branch_text.values(), strict=True)), *self.mixture_text]

    def dense(self, rate: float) -> nn.Module:
        model = copy_of(self.base)
        learn(model, self.dense_text, rate)
        return model

    def mixture(self, name: str, rate: float) -> PeftModel:
        torch.manual_seed(self.seed)
        groups = [*LANGUAGES, MORE] if name == "BTX, larger" else LANGUAGES
        model = mix(
            self.folder / "seed",
            {group: self.folder / group for group in groups},
            others=dict.fromkeys((ORIGINAL_GROUP, *LANGUAGES), 1.0),
            base_output=self.folder / f"{name} at {rate}",
            **MIXTURES[name],
        )
        learn(model, self.mixture_text, rate)
        return model

    def untrained(self) -> PeftModel:
        """Branches' experts over the seed, routers in closed form."""
        model = mix(self.folder / "seed", {code: self.folder / code for code in LANGUAGES}, top_k=1)
        fit_routers(model, self.fitted, self.corpus.tokenizer, max_length=LENGTH)
        return model


def mean_of(base: nn.Module, branches: list[nn.Module]) -> nn.Module:
    """The mean of models' weights, in a copy of another."""
    model = copy_of(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.stack([branch.get_parameter(name) for branch in branches]).mean(0))
    return model


@torch.no_grad()
def shares_on_own_expert(model: PeftModel, tokenizer: PreTrainedTokenizerFast, texts: Mapping[str, list[str]]) -> Any:
    """For each layer, mean over languages of the share of tokens whose first choice is their language's expert."""
    layers: list[MoeDeltaLayer] = list(tuner_of(model).layers().values())
    right, total = torch.zeros(len(layers), len(texts)), torch.zeros(len(texts))

    def count(router: nn.Module, given: Any, logits: Tensor, *, at: tuple[int, int], own: int) -> None:
        right[at] += (logits.argmax(-1) == own).sum()

    for column, (code, documents) in enumerate(texts.items()):
        own = tuner_of(model).active_config.record.group_order.index(code)
        handles = [
            layer.router("default").register_forward_hook(partial(count, at=(index, column), own=own))
            for index, layer in enumerate(layers)
        ]
        for document in documents:
            for ids in tokenizer(document, return_tensors="pt")["input_ids"].split(LENGTH, dim=1):
                total[column] += ids.numel()
                model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
    return (right / total).mean(dim=1).tolist()


def one_seed(corpus: Corpus, seed: int, rates: Rates) -> tuple[dict[str, Row], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        work = Mixing(corpus, seed, Path(folder))
        branched = sum(map(tokens, work.branch_text.values()))
        mixed = branched + tokens(work.mixture_text)
        rows = {"seed": row(work.base, corpus)}
        dense = rates.best("dense", RATES, work.dense)
        rows["dense"] = row(dense, corpus, read=tokens(work.dense_text), trained=trainable(dense))
        for name in MIXTURES:
            model = rates.best(name, RATES, partial(work.mixture, name))
            rows[name] = row(model, corpus, read=mixed, trained=added(model))
        model = work.untrained()
        shares = shares_on_own_expert(model, corpus.tokenizer, corpus.parts["test"])
        rows["closed form"] = row(model, corpus, read=branched)
        with tuner_of(model).in_routing("language"):
            # A token costs the same, whoever names its expert.
            rows["forced"] = {**rows["closed form"], "bits": bits(model, corpus, told=True)}
    return rows, {"share_on_own_expert": shares}


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(scores: Scores) -> str:
    """All there is to say."""
    trained = {name: title for name, title in TITLES.items() if name in (*MIXTURES, "dense")}
    body = []
    for name, title in TITLES.items():
        moved = ["", ""] if name == "seed" else [shown(scores.less(name, "seed", *c)) for c in ((ENGLISH,), LANGUAGES)]
        body.append((title, *(values(scores.of(name, code)) for code in LANGUAGES), *moved))
    head = ("bits per byte", *LANGUAGES, "English, less seed", "all, less seed")
    claims = {f"{TITLES[a]} less {TITLES[b]}, all languages": scores.less(a, b, *LANGUAGES) for a, b in PAIRS}
    claims |= {f"{TITLES[n]}, English, less the seed": scores.less(n, "seed", ENGLISH) for n in trained}
    columns = {"English": (ENGLISH,), "Hungarian": ("hu",), "Greek": ("el",), "all": LANGUAGES}
    return "\n\n".join(
        (
            scores.setting(),
            table(head, body),
            differences(scores, PAIRS, TITLES, columns),
            scores.costs(TITLES),
            f"{sentences(claims)}\n{closed_form(scores)}",
        )
    )


def closed_form(scores: Scores) -> str:
    """The two figures of closed-form routers that have a target: the worst over languages, layers and random seeds."""
    own = min(100 * share for one in scores.seeds for share in one["share_on_own_expert"])
    worse = max(
        float((100 * (scores.of("closed form", code) / scores.of("forced", code) - 1))[0].max()) for code in LANGUAGES
    )
    return (
        f"- Closed-form routers: {own:.1f}% of held-out tokens or more on their language's expert in every layer "
        f"(target {PERCENT_OWN:.0f}), {worse:+.2f}% bits per byte or less against forced "
        f"routing (target {PERCENT_WORSE:.0f})."
    )


def settings() -> dict[str, Any]:
    return {
        "steps": dict(STEPS), "step": [ROWS, LENGTH], "rates": list(RATES), "seed_rate": SEED_RATE,
        "branch_rate": BRANCH_RATE, "shape": dict(SHAPE),
    }  # fmt: skip


BENCHMARK = Benchmark("mixing", __doc__ or "", LANGUAGES, settings, one_seed, tables)

if __name__ == "__main__":
    BENCHMARK.main()
