"""Benchmarks that compare ways of training: they run, what differs is what is named, their words follow intervals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import bench_allocation
import bench_growing
import bench_mixing
import pytest
import torch
from comparison import RESULTS, Batch, Benchmark, Corpus, Rates, batches, costs, tokens
from pairs import ROWS, Making
from peft import get_peft_model
from verdicts import Scores, filled, sentences, word

from made_up import documents
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation.bootstrap import Interval

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MODULES = (bench_growing, bench_mixing, bench_allocation)
BENCHMARKS = [module.BENCHMARK for module in MODULES]
PICO = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def corpus_of(codes) -> Corpus:
    parts = {"train": slice(0, 60), "validation": slice(60, 62), "test": slice(62, 66)}
    return Corpus.of({part: {code: documents(code, 66, 60)[cut] for code in codes} for part, cut in parts.items()})


@pytest.fixture
def short(monkeypatch):
    """Two steps of everything, with models of a few thousand weights."""
    for module in MODULES:
        monkeypatch.setattr(module, "STEPS", dict.fromkeys(module.STEPS, 2))
        monkeypatch.setattr(module, "SHAPE", PICO)
        monkeypatch.setattr(module, "RATES", (1e-3,))
    monkeypatch.setattr(bench_growing, "REVIEW_RATES", (1e-3,))
    monkeypatch.setattr(bench_allocation, "MEASURED", {"tokens": 200, "steps": 2, "sequence_length": 96})


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_the_page_is_that_of_the_committed_scores(benchmark: Benchmark):
    page, file = PAGE.read_text(encoding="utf-8"), RESULTS / f"{benchmark.name}.json"
    made = benchmark.part_of_page(file)
    assert made == benchmark.part_of_page(file)
    assert filled(page, benchmark.name, made) == page


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_the_committed_scores_are_of_enough(benchmark: Benchmark):
    file = RESULTS / f"{benchmark.name}.json"
    if not file.is_file():
        pytest.skip(f"{file.name} has not been made yet")
    kept = Scores.read(file).kept
    assert kept["settings"] == benchmark.settings()
    assert len(kept["seeds"]) >= 3 and min(map(len, kept["sizes"].values())) >= 40


class MadeUp(dict):
    """Rows of made-up scores, of whatever name is asked for."""

    def __init__(self, codes, seed: int) -> None:
        super().__init__()
        self.codes, self.seed = codes, seed

    def __missing__(self, name: str):
        drawn = random.Random(f"{name} {self.seed}")
        bits = {code: [drawn.uniform(200, 400) for _ in range(4)] for code in self.codes}
        return {
            "parameters": 9,
            "active": 8,
            "flops": 7,
            "trained": 6,
            "tokens": drawn.randint(1000, 9000),
            "bits": bits,
        }


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_tables_and_sentences_come_from_scores_alone(benchmark: Benchmark):
    plan = {"languages": {"en": "original", "hu": "a", "el": "b"}, "experts": [2, 0]}
    seeds = [
        {"seed": seed, "rows": MadeUp(benchmark.codes, seed), "told_bit_equal": True, "share_on_own_expert": [0.9],
         "plans": {"uniform": plan, "dmoe": plan}}
        for seed in range(3)
    ]  # fmt: skip
    sizes = {code: [100, 200, 150, 120] for code in benchmark.codes}
    made = benchmark.tables(
        Scores({"settings": benchmark.settings(), "sizes": sizes, "rates": {"dense": 1e-3}, "seeds": seeds})
    )
    claims = [line for line in made.splitlines() if line.startswith("- ")]
    assert len(claims) >= 8 and any(found in made for found in ("lower.", "higher.", "undecided."))
    assert "passed by a token" in made and "English" in made and "Random seeds 0, 1, 2; 4 held-out" in made


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_a_benchmark_runs_once(benchmark: Benchmark, tmp_path, short):
    corpus, file = corpus_of(benchmark.codes), tmp_path / "scores.json"
    benchmark.run(corpus, range(2), file)
    before = file.stat().st_mtime_ns
    benchmark.run(corpus, range(2), file)
    assert file.stat().st_mtime_ns == before
    made = benchmark.tables(Scores.read(file))
    assert "English" in made and "passed by a token" in made
    kept = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**kept, "settings": {}}), encoding="utf-8")
    with pytest.raises(DataError, match="other settings or documents"):
        benchmark.run(corpus, range(2), file)


@pytest.mark.slow
def test_ways_of_growing_read_the_same_and_cost_the_same(short):
    rows, more = bench_growing.one_seed(corpus := corpus_of(bench_growing.BENCHMARK.codes), 0, Rates(corpus))
    last = [rows[f"{name}/ru"] for name in bench_growing.WAYS] + [rows["joint"]]
    assert more["told_bit_equal"]
    assert {(r["tokens"], r["parameters"], r["active"], r["flops"], r["trained"]) for r in last} == {
        (4 * 2 * 2 * ROWS * 96, *(last[0][key] for key in ("parameters", "active", "flops", "trained")))
    }
    assert rows["dense/ru"]["tokens"] == rows["joint"]["tokens"]


@pytest.mark.slow
def test_the_plain_mixture_is_as_large_as_full_attention_experts(short):
    rows, _ = bench_mixing.one_seed(corpus := corpus_of(bench_mixing.BENCHMARK.codes), 0, Rates(corpus))
    larger, full = rows["BTX, larger"], rows["full"]
    routers = 2 * PICO["hidden_size"] * (4 - 1)  # in two layers, four rows for attention against one for an MLP
    assert full["parameters"] - larger["parameters"] == routers
    assert full["active"] - larger["active"] == routers
    read = {row["tokens"] for name, row in rows.items() if name in (*bench_mixing.MIXTURES, "dense")}
    assert read == {(3 + 1) * 2 * ROWS * 96}


@pytest.mark.slow
def test_plans_of_one_budget_have_as_many_experts(short):
    rows, more = bench_allocation.one_seed(corpus := corpus_of(bench_allocation.BENCHMARK.codes), 0, Rates(corpus))
    numbers = {name: sum(plan["experts"]) for name, plan in more["plans"].items()}
    assert numbers == {"uniform": 4, "inverse": 4, "twice": 8, "dmoe": 4, "odds": 4, "least": 4}
    alike, odds = (more["plans"][name]["languages"] for name in ("dmoe", "odds"))
    assert alike != odds and sorted(alike.values()) == sorted(odds.values())
    layers = [[count > 0 for count in more["plans"][name]["experts"]] for name in ("dmoe", "least")]
    assert layers[0] == [not has for has in layers[1]]
    assert len({row["tokens"] for name, row in rows.items() if name != "base"}) == 1


def test_one_name_gives_the_same_rows_and_languages_take_turns():
    rows = {code: torch.arange(12).view(6, 2) + 100 * i for i, code in enumerate(("en", "hu"))}
    once, again, other = (batches(rows, ["en", "hu", "hu"], 3, name) for name in ("a", "a", "b"))
    assert all(torch.equal(x.ids, y.ids) and x.codes == y.codes for x, y in zip(once, again, strict=True))
    assert any(not torch.equal(x.ids, y.ids) for x, y in zip(once, other, strict=True))
    codes = [code for batch in once for code in batch.codes]
    assert codes == ["en", "hu", "hu"] * ROWS and tokens(once) == 3 * ROWS * 2
    assert all((batch.ids[i, 0] >= 100) == (code == "hu") for batch in once for i, code in enumerate(batch.codes))
    assert isinstance(once[0], Batch)


def test_what_a_token_does_not_pass_is_not_active():
    torch.manual_seed(0)
    corpus = corpus_of(("en", "hu"))
    base = Making("llama", shape=PICO).new_model(corpus.tokenizer)
    before, mlp = costs(base), sum(p.numel() for p in base.model.layers[0].mlp.parameters())
    languages = {"en": "original", "hu": "expanded"}
    found = costs(get_peft_model(base, MoeDeltaConfig(languages=languages, experts={"expanded": 3}, top_k=2)).eval())
    routers = 2 * 4 * PICO["hidden_size"]
    assert before["active"] == before["parameters"]
    assert found["parameters"] == before["parameters"] + 2 * 3 * mlp + routers
    assert found["active"] == before["parameters"] + 2 * mlp + routers
    assert found["flops"] == before["flops"] + 2 * (2 * mlp + routers)


def test_figures_worked_by_hand():
    seeds = [
        {"seed": seed, "rows": {"a": {"bits": {"en": [2.0, 6.0 + seed]}}, "b": {"bits": {"en": [4.0, 8.0 + seed]}}}}
        for seed in (0, 2)
    ]
    scores = Scores({"sizes": {"en": [2, 6]}, "seeds": seeds})
    assert scores.of("a", "en")[0].tolist() == [1.0, 1.25]
    assert scores.less("a", "b", "en").value == -0.5
    assert scores.less("a", "a", "en") == (0.0, 0.0, 0.0)


def test_words_follow_intervals():
    assert word(Interval(-1.0, -2.0, -0.5)) == "lower" and word(Interval(1.0, 0.5, 2.0)) == "higher"
    assert word(Interval(1.0, 0.0, 2.0)) == word(Interval(-1.0, -2.0, 0.0)) == "undecided"
    assert sentences({"A less B": Interval(-1.0, -2.0, -0.5)}) == "- A less B: -1.000 [-2.000, -0.500], lower."
