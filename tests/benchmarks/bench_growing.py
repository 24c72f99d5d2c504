"""Lifelong expansion: languages added one after another, what that costs those that were there, and the other ways.

    python examples/demo_inputs.py --output build/demo/inputs --also en hu el tr ru
    python tests/benchmarks/bench_growing.py --page docs/benchmarks.md

For each random seed, a small model is pre-trained on mostly English text and gets an expert for Hungarian. From there
Greek, Turkish and Russian are added one after another:

- grown, as this library does it: new rows in closed form, earlier rows frozen, every earlier group protected
- the same with the whole router initialised anew and trained at each insertion, which is all they differ in
- the same with English alone protected, which is all they differ in
- both, and expansion under learned routing: how LayerMoE's code does it (arXiv 2505.22582)

All four have the same new expert (but the last, which trains it under its own routing), read the same rows in the same
order, and none reads more: routers in closed form are fitted to the rows of the review. Two rows read the same text in
another way: all experts trained and reviewed at once, and the dense model, all of whose weights train. Nobody tells a
model a language when it is scored.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from comparison import Batch, Benchmark, Corpus, Rates, Row, as_text, batches, learn, pretrain, row, tokens
from frontier.family import added, trainable
from frontier.tables import shown, table
from pairs import ENGLISH, LENGTH, ROWS, Making, copy_of, rows_of
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from verdicts import Scores, differences, sentences, values

from peft_moe_delta import MoeDeltaConfig, fit_routers
from peft_moe_delta.graft.memory import tuner_of
from peft_moe_delta.languages import ORIGINAL_GROUP
from peft_moe_delta.mixing import EARLIER_WEIGHT

FIRST, LATER = "hu", ("el", "tr", "ru")
NEW = (FIRST, *LATER)
STEPS = {"pre-training": 200, "expansion": 48, "review": 12}
"""Of 8 x 96 tokens; expansion and review for each language."""
EXPANSION_RATE, REVIEW_RATES, RATES = 3e-3, (1e-3, 1e-2), (1e-3, 3e-3)
"""Of all experts, as the frontier study found it best on validation text; of reviews; of the dense model. Of two, one
is chosen for each row."""
PRIOR = 1.0
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}


@dataclass(frozen=True)
class Way:
    """A way to add a language.

    Attributes:
        title: what tables call it.
        anew: the whole router is initialised anew, and all of it trains.
        english_alone: the prior loss protects English, not what was added before.
        learned: the expert trains under learned routing.
    """

    title: str
    anew: bool = False
    english_alone: bool = False
    learned: bool = False


WAYS = {
    "grown": Way("grown"),
    "anew": Way("routers anew", anew=True),
    "english": Way("English alone protected", english_alone=True),
    "published": Way("LayerMoE's published way", anew=True, english_alone=True, learned=True),
}
TITLES = {
    "base": "base", FIRST: "with Hungarian", **{name: way.title for name, way in WAYS.items()},
    "joint": "all at once", "dense": "dense, one after another",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What every way of a random seed reads."""

    rows: Mapping[str, Tensor]
    seed: int

    def new(self, code: str) -> list[Batch]:
        return batches(self.rows, [code], STEPS["expansion"], f"{code} {self.seed}")

    def review(self, code: str) -> list[Batch]:
        """What is read once a language has been learnt: those before it, twice as much of each, and itself."""
        before = [ENGLISH, *NEW[: NEW.index(code)]]
        turns = before * int(EARLIER_WEIGHT) + [code]
        return batches(self.rows, turns, STEPS["review"], f"review {code} {self.seed}")

    def all_new(self) -> list[Batch]:
        """The same batches of new languages, which take turns."""
        return list(chain.from_iterable(zip(*(self.new(code) for code in NEW), strict=True)))

    def all_reviews(self) -> list[Batch]:
        """The same batches of all reviews, shuffled."""
        found = [batch for code in NEW for batch in self.review(code)]
        return random.Random(self.seed).sample(found, len(found))

    def until(self, code: str) -> int:
        """Tokens read once a language is there."""
        return sum(tokens(self.new(c)) + tokens(self.review(c)) for c in NEW[: NEW.index(code) + 1])


@dataclass(frozen=True)
class Growing:
    """One random seed under way.

    Attributes:
        expanded: language -> its expert's weights, once it was trained by language: no other way changes them.
    """

    base: nn.Module
    text: Reading
    corpus: Corpus
    expanded: dict[str, dict[str, Tensor]]

    def upcycled(self, codes: Sequence[str]) -> PeftModel:
        languages = {ENGLISH: ORIGINAL_GROUP, **{code: code for code in codes}}
        config = MoeDeltaConfig(languages=languages, experts=dict.fromkeys(codes, 1), routing="language")
        return get_peft_model(copy_of(self.base), config)

    def first(self, rate: float) -> PeftModel:
        """With Hungarian: what every way of growing begins with."""
        torch.manual_seed(self.text.seed)
        model = self.upcycled([FIRST])
        learn(model, self.text.new(FIRST), EXPANSION_RATE)
        return self.reviewed(model, self.text.review(FIRST), rate)

    def joint(self, rate: float) -> PeftModel:
        """All languages at once, from the same batches."""
        torch.manual_seed(self.text.seed)
        model = self.upcycled(NEW)
        learn(model, self.text.all_new(), EXPANSION_RATE)
        return self.reviewed(model, self.text.all_reviews(), rate)

    def reviewed(self, model: PeftModel, read: list[Batch], rate: float) -> PeftModel:
        groups = list(tuner_of(model).active_config.language_table.groups)
        model.start_review(routing="learned", language_prior_groups=groups, language_prior_coef=PRIOR)
        fit_routers(model, as_text(read, self.corpus.tokenizer), self.corpus.tokenizer, max_length=LENGTH)
        learn(model, read, rate)
        return model

    def grown(self, first: PeftModel, way: Way, rate: float) -> list[PeftModel]:
        """The model after each insertion."""
        stages = [first]
        for code in LATER:
            torch.manual_seed(self.text.seed + 1)
            stages.append(self.inserted(copy.deepcopy(stages[-1]), way, code, rate))
        return stages[1:]

    def inserted(self, model: PeftModel, way: Way, code: str, rate: float) -> PeftModel:
        """One language more."""
        model.add_languages({code: code}, {code: 1})
        if way.anew:
            initialise_routers(model)
        if way.learned:
            model.start_expansion(routing="learned", train_earlier_rows=True)
            learn(model, self.text.new(code), EXPANSION_RATE)
        else:
            self.expand_by_language(model, code)
        groups = [ORIGINAL_GROUP] if way.english_alone else list(tuner_of(model).active_config.language_table.groups)
        model.start_review(
            routing="learned", language_prior_groups=groups, language_prior_coef=PRIOR, train_earlier_rows=way.anew
        )
        read = self.text.review(code)
        if not way.anew:
            texts = as_text(read, self.corpus.tokenizer)
            fit_routers(model, texts, self.corpus.tokenizer, only="newest", max_length=LENGTH)
        learn(model, read, rate)
        return model

    def expand_by_language(self, model: PeftModel, code: str) -> None:
        """Train the new expert, or take it from the way that came first."""
        model.start_expansion(routing="language")
        new = {n: p for n, p in model.named_parameters() if p.requires_grad and "moe_delta_experts" in n}
        if code not in self.expanded:
            learn(model, self.text.new(code), EXPANSION_RATE)
            self.expanded[code] = {name: parameter.detach().clone() for name, parameter in new.items()}
        with torch.no_grad():
            for name, parameter in new.items():
                parameter.copy_(self.expanded[code][name])

    def dense(self, rate: float) -> list[nn.Module]:
        """The model after each language, all weights trained on the same batches in the same order."""
        stages = [self.base]
        for code in NEW:
            model = copy_of(stages[-1])
            learn(model, [*self.text.new(code), *self.text.review(code)], rate)
            stages.append(model)
        return stages[1:]


def initialise_routers(model: PeftModel) -> None:
    """As LayerMoE's code does it at each insertion."""
    tuner = tuner_of(model)
    for layer in tuner.layers().values():
        router = layer.router(tuner.active_adapters[0])
        parts = list(router.parameters())
        fresh = nn.init.xavier_normal_(torch.empty_like(router.rows))
        for part, initial in zip(parts, fresh.split([len(p) for p in parts]), strict=True):
            part.data.copy_(initial)


@torch.no_grad()
def told(model: PeftModel, text: Reading, codes: Sequence[str]) -> list[Tensor]:
    """Logits of some rows under routing by language."""
    with tuner_of(model).in_routing("language"):
        return [model(input_ids=text.rows[code][:2], language=code, use_cache=False).logits for code in codes]


def told_alike(stages: Sequence[PeftModel], text: Reading) -> bool:
    """Whether insertions leave earlier languages bit-equal under routing by language."""
    known = [[ENGLISH, *NEW[: i + 1]] for i in range(len(stages) - 1)]
    pairs = zip(stages, stages[1:], known, strict=False)
    return all(
        torch.equal(one, other)
        for before, after, codes in pairs
        for one, other in zip(told(before, text, codes), told(after, text, codes), strict=True)
    )


def one_seed(corpus: Corpus, seed: int, rates: Rates) -> tuple[dict[str, Row], dict[str, Any]]:
    """All rows: `base`, `joint`, and `<way>/<language>` for a model after that language was added."""
    torch.manual_seed(seed)
    text = Reading(rows_of(corpus.tokenizer, corpus.parts["train"], seed), seed)
    base = Making("qwen3", shape=SHAPE).new_model(corpus.tokenizer)
    pretrain(base, text.rows, STEPS["pre-training"], str(seed))
    work = Growing(base, text, corpus, {})
    rows = {"base": row(base, corpus)}
    first = rates.best(FIRST, REVIEW_RATES, work.first)
    rows[FIRST] = row(first, corpus, read=text.until(FIRST), trained=added(first))
    alike = True
    for name, way in WAYS.items():
        stages = rates.best(name, REVIEW_RATES, lambda rate, way=way: work.grown(first, way, rate))
        rows |= {f"{name}/{c}": scored(m, corpus, text, c, added(m)) for c, m in zip(LATER, stages, strict=True)}
        alike = alike and told_alike([first, *stages], text)
    stages = rates.best("dense", RATES, work.dense)
    rows |= {f"dense/{c}": scored(m, corpus, text, c, trainable(m)) for c, m in zip(NEW, stages, strict=True)}
    joint = rates.best("joint", REVIEW_RATES, work.joint)
    rows["joint"] = row(joint, corpus, read=text.until(NEW[-1]), trained=added(joint))
    return rows, {"told_bit_equal": alike}


def scored(model: nn.Module, corpus: Corpus, text: Reading, code: str, trained: int) -> Row:
    """A stage's row: all languages at the end, before that those that are there."""
    known = [ENGLISH, *NEW[: NEW.index(code) + 1]]
    return row(model, corpus, read=text.until(code), trained=trained, codes=known)


# -- tables -----------------------------------------------------------------------------------------------------------


def at(name: str, code: str = LATER[-1]) -> str:
    """The row of a way when a language has been added; the last one by default."""
    return f"{name}/{code}" if name in WAYS or name == "dense" else name


def learnt(name: str, code: str) -> str:
    """The row in which a language was new."""
    if code == ENGLISH:
        return "base"
    return FIRST if code == FIRST and name in WAYS else at(name, code)


def total_drift(scores: Scores, name: str, *codes: str) -> Any:
    """From the row in which a language was new to the last one, the mean over languages."""
    return sum(scores.of(at(name), code) - scores.of(learnt(name, code), code) for code in codes) / len(codes)


def most_at_once(scores: Scores, name: str) -> float:
    """The most that one insertion moved a language that was there, mean over seeds."""
    stages = [FIRST if name in WAYS else at(name, FIRST), *(at(name, code) for code in LATER)]
    moved = [
        float((scores.of(after, code) - scores.of(before, code))[0].mean())
        for index, (before, after) in enumerate(pairwise(stages))
        for code in (ENGLISH, *NEW[: index + 1])
    ]
    return max(moved, key=abs)


def kept_table(scores: Scores) -> str:
    """Every row's bits per byte, and what moved."""
    codes, earlier, body = (ENGLISH, *NEW), NEW[:-1], []
    for name, title in TITLES.items():
        own = [values(scores.of(at(name), code)) for code in codes]
        english = "" if name == "base" else shown(scores.less(at(name), "base", ENGLISH))
        gained = "" if name == "base" else shown(scores.less(at(name), "base", *NEW))
        drift = most = ""
        if name in WAYS or name == "dense":
            drift = shown(scores.interval(total_drift(scores, name, *earlier)))
            most = f"{most_at_once(scores, name):+.3f}"
        body.append((title, *own, english, drift, most, gained))
    head = (
        "bits per byte", *codes, "English, less base", f"drift of {', '.join(earlier)}", "most by one insertion",
        "new languages, less base",
    )  # fmt: skip
    return table(head, body)


COMPARED = {
    "English": (ENGLISH,), "earlier languages": NEW[:-1], "newest language": NEW[-1:], "all five": (ENGLISH, *NEW),
}  # fmt: skip


def tables(scores: Scores) -> str:
    """All there is to say."""
    last = {at(name): title for name, title in TITLES.items()}
    others = [at(name) for name in ("anew", "english", "published", "joint", "dense")]
    alike = all(one["told_bit_equal"] for one in scores.seeds)
    claims = {
        "Grown, English, less the base": scores.less(at("grown"), "base", ENGLISH),
        "Grown, total drift of Hungarian, Greek and Turkish": scores.interval(total_drift(scores, "grown", *NEW[:-1])),
        "Grown, new languages, less the base": scores.less(at("grown"), "base", *NEW),
        **{
            f"Grown less {last[other]}, {what}": scores.less(at("grown"), other, *codes)
            for other in others
            for what, codes in (("English", (ENGLISH,)), ("all five languages", (ENGLISH, *NEW)))
        },
    }
    return "\n\n".join(
        (
            scores.setting(),
            kept_table(scores),
            differences(scores, [(at("grown"), other) for other in others], last, COMPARED),
            scores.costs(last),
            f"{sentences(claims)}\n{joint_cost(scores)}\n- Earlier languages' logits under routing by language, before "
            f"and after every insertion of every way: {'bit-equal' if alike else 'NOT bit-equal'}.",
        )
    )


def joint_cost(scores: Scores) -> str:
    """What adding the last language costs, and what training all again would."""
    whole, before = scores.row(at("grown"))["tokens"], scores.row(at("grown", LATER[-2]))["tokens"]
    return (
        f"- Cost: adding the last language read {whole - before:,} tokens. Training all four at once again reads "
        f"{scores.row('joint')['tokens']:,}, {scores.row('joint')['tokens'] / (whole - before):.1f} times as many, "
        "for a model of the same parameters and operations per token."
    )


def settings() -> dict[str, Any]:
    return {
        "steps": dict(STEPS), "step": [ROWS, LENGTH], "rates": list(RATES),
        "review_rates": list(REVIEW_RATES), "expansion_rate": EXPANSION_RATE,
        "shape": dict(SHAPE),
    }  # fmt: skip


BENCHMARK = Benchmark("growing", __doc__ or "", (ENGLISH, *NEW), settings, one_seed, tables)

if __name__ == "__main__":
    BENCHMARK.main()
