"""Does it matter where the experts are, and who shares them? LayerMoE's and DMoE's plans beside others of equal size.

    python examples/demo_inputs.py --output build/demo/inputs --also en hu el tr ru
    python tests/benchmarks/bench_allocation.py --page docs/benchmarks.md

For each random seed, a small model is pre-trained on mostly English text and then learns Hungarian, Greek, Turkish and
Russian. All plans have the same number of new experts, but for one that is named, and read the same rows in the same
order.

One group for all new languages, trained and reviewed as in MoE-LPR (arXiv 2408.11396):

- uniform; inverse similarity (LayerMoE, arXiv 2505.22582), as many experts; and uniform with twice as many, which
  LayerMoE's plan is said to equal

Two groups, a tenth of the steps under hard routing, then top-2 with the routers told the groups (DMoE, arXiv
2506.12388):

- the groups and the layers that DMoE chooses by how languages move the weights
- the same layers, groups of the languages least alike
- the same groups, the layers that move least

And the dense model, all of whose weights train on the same rows. English is scored beside the new languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from comparison import Batch, Benchmark, Corpus, Rates, Row, batches, learn, pretrain, row, tokens
from frontier.family import added, trainable
from frontier.methods import MEASURED
from frontier.tables import shown, table
from pairs import ENGLISH, LENGTH, ROWS, Making, copy_of, rows_of
from peft import PeftModel, get_peft_model
from torch import nn
from verdicts import Scores, differences, sentences, values

from peft_moe_delta import ExpertPlan, MoeDeltaConfig, allocate_experts, group_languages
from peft_moe_delta.allocation import LanguageStatistics, Measurement, measure_languages
from peft_moe_delta.languages import ORIGINAL_GROUP

NEW = ("hu", "el", "tr", "ru")
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "head_dim": 16}
STEPS = {"pre-training": 120, "expansion": 32, "review": 8}
"""Of 8 x 96 tokens."""
RATES = (1e-3, 3e-3)
HARD = 10  # a tenth of the expansion
TITLES = {
    "base": "base", "dense": "dense", "uniform": "uniform", "inverse": "inverse similarity",
    "twice": "uniform, twice the experts", "dmoe": "DMoE's groups and layers", "odds": "groups least alike",
    "least": "layers that move least",
}  # fmt: skip
GROUPED = ("dmoe", "odds", "least")
PAIRS = (
    ("inverse", "uniform"), ("inverse", "twice"), ("twice", "uniform"), ("dmoe", "odds"), ("dmoe", "least"),
    ("dmoe", "uniform"), ("uniform", "dense"),
)  # fmt: skip


@dataclass(frozen=True)
class Allocation:
    """One random seed under way: the base, what is read, and what plans are made from."""

    base: nn.Module
    corpus: Corpus
    new: list[Batch]
    review: list[Batch]
    seed: int

    @cached_property
    def measured(self) -> LanguageStatistics:
        measurement = Measurement(**MEASURED, seed=self.seed)
        tokenizer, texts = self.corpus.tokenizer, self.corpus.parts["train"]
        return measure_languages(
            self.base, tokenizer, texts, sources=["similarity", "deviation"], measurement=measurement
        )

    def plan(self, name: str) -> tuple[dict[str, str], ExpertPlan]:
        """Languages in their groups, and experts in layers."""
        layers = len(self.measured.layers)
        if name not in GROUPED:
            languages = {ENGLISH: ORIGINAL_GROUP, **dict.fromkeys(NEW, "expanded")}
            strategy = "inverse_similarity" if name == "inverse" else "uniform"
            budget = (4 if name == "twice" else 2) * layers
            return languages, allocate_experts(self.measured, strategy, budget, languages=languages)
        likeness = self.measured.between_languages()
        alike = group_languages(likeness, NEW, num_groups=2, original=[ENGLISH], resamples=0).as_languages()
        languages = least_alike(likeness) if name == "odds" else alike
        every_layer = {code: -change for code, change in self.measured.deviation().items()}
        figures = every_layer if name == "least" else self.measured.deviation()
        plan = allocate_experts(
            figures, "deviation_threshold", languages=languages, top_layers=layers // 2, experts_per_group=2
        )
        return languages, plan

    def dense(self, rate: float) -> nn.Module:
        model = copy_of(self.base)
        learn(model, [*self.new, *self.review], rate)
        return model

    def planned(self, name: str, rate: float) -> PeftModel:
        """Expansion and review."""
        torch.manual_seed(self.seed)
        languages, plan = self.plan(name)
        routing = "language" if name in GROUPED else "learned"
        config = MoeDeltaConfig(languages=languages, experts=plan, routing=routing, top_k=2)
        model = get_peft_model(copy_of(self.base), config)
        hard = max(1, len(self.new) // HARD) if name in GROUPED else 0
        if hard:
            learn(model, self.new[:hard], rate)
            groups = sorted({group for group in languages.values() if group != ORIGINAL_GROUP})
            model.start_expansion(routing="learned", language_prior_coef=1.28, language_prior_groups=groups)
        learn(model, self.new[hard:], rate)
        model.start_review()
        learn(model, self.review, rate)
        return model


def least_alike(likeness: Any) -> dict[str, str]:
    """Two pairs of languages, the ones of least similarity in all."""
    first, *others = NEW

    def rest(partner: str) -> list[str]:
        return [code for code in others if code != partner]

    def alike(partner: str) -> float:
        one, other = rest(partner)
        return float(likeness[first][partner] + likeness[one][other])

    partner = min(others, key=alike)
    groups = {first: "expanded_1", partner: "expanded_1", **dict.fromkeys(rest(partner), "expanded_2")}
    return {ENGLISH: ORIGINAL_GROUP, **{code: groups[code] for code in NEW}}


def one_seed(corpus: Corpus, seed: int, rates: Rates) -> tuple[dict[str, Row], dict[str, Any]]:
    torch.manual_seed(seed)
    rows = rows_of(corpus.tokenizer, corpus.parts["train"], seed)
    base = Making("qwen3", shape=SHAPE).new_model(corpus.tokenizer)
    pretrain(base, rows, STEPS["pre-training"], str(seed))
    new = batches(rows, NEW, STEPS["expansion"], f"new {seed}")
    review = batches(rows, (ENGLISH, *NEW), STEPS["review"], f"review {seed}")
    work, read = Allocation(base, corpus, new, review, seed), tokens(new) + tokens(review)
    found = {"base": row(base, corpus)}
    dense = rates.best("dense", RATES, work.dense)
    found["dense"] = row(dense, corpus, read=read, trained=trainable(dense))
    plans: dict[str, Any] = {}
    for name in TITLES:
        if name in found:
            continue
        model = rates.best(name, RATES, partial(work.planned, name))
        found[name] = row(model, corpus, read=read, trained=added(model))
        languages, plan = work.plan(name)
        plans[name] = {"languages": languages, "experts": [plan.num_experts(i) - 1 for i in work.measured.layers]}
    return found, {"plans": plans}


# -- tables -----------------------------------------------------------------------------------------------------------


def laid_out(scores: Scores, name: str) -> str:
    """New experts a layer, and the groups, of every seed where they differ."""
    if name not in scores.seeds[0]["plans"]:
        return ""
    found = []
    for one in scores.seeds:
        plan = one["plans"][name]
        groups: dict[str, list[str]] = {}
        for code, group in plan["languages"].items():
            groups.setdefault(group, []).append(code)
        named = " + ".join(" ".join(codes) for group, codes in sorted(groups.items()) if group != ORIGINAL_GROUP)
        counts = " ".join(map(str, plan["experts"]))
        found.append(f"{counts} ({named})" if name in GROUPED else counts)
    return "; ".join(dict.fromkeys(found))


def tables(scores: Scores) -> str:
    """All there is to say."""
    body = []
    for name, title in TITLES.items():
        own = [values(scores.of(name, *codes)) for codes in ((ENGLISH,), *((code,) for code in NEW), NEW)]
        moved = [shown(scores.less(name, "base", *codes)) for codes in ((ENGLISH,), (ENGLISH, *NEW))]
        body.append((title, laid_out(scores, name), *own, *(["", ""] if name == "base" else moved)))
    head = (
        "bits per byte", "new experts a layer", ENGLISH, *NEW, "new languages", "English, less base",
        "all five, less base",
    )  # fmt: skip
    columns: dict[str, Sequence[str]] = {"new languages": NEW, "English": (ENGLISH,), "all five": (ENGLISH, *NEW)}
    claims = {
        f"{TITLES[a]} less {TITLES[b]}, {what}": scores.less(a, b, *columns[what])
        for a, b in PAIRS
        for what in ("new languages", "English")
    }
    return "\n\n".join(
        (
            scores.setting(),
            table(head, body),
            differences(scores, PAIRS, TITLES, columns),
            scores.costs(TITLES),
            sentences({claim[0].upper() + claim[1:]: found for claim, found in claims.items()}),
        )
    )


def settings() -> dict[str, Any]:
    return {"steps": dict(STEPS), "step": [ROWS, LENGTH], "rates": list(RATES), "shape": dict(SHAPE)}


BENCHMARK = Benchmark("allocation", __doc__ or "", (ENGLISH, *NEW), settings, one_seed, tables)

if __name__ == "__main__":
    BENCHMARK.main()
