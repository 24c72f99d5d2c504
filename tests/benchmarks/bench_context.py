"""Routing after a graft whose delta is large: does the tuned skill survive, and do the new languages?

    python tests/benchmarks/bench_context.py --seeds 3

For each random seed, from nothing: a small model is pre-trained on English with a little Hungarian and Greek, and
tuned on conversations until its embeddings have moved by more than half. The base learns Hungarian and Greek, an expert
each; its routers are fitted as `fit_routers` does it before a graft. Then the tuned model's delta is grafted on, and
routed in turn by language (told, which is what can be had), by context (read from the text), by those routers, and by
routers that were calibrated on the grafted model. Printed for each: tuned tasks answered exactly, bits per byte of
held-out text, German included, which nobody named, and the share of tokens that leave for the right experts. The text
is that of ../shared; without it there is nothing to do.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import print_table
from pairs import (
    ENGLISH,
    LENGTH,
    ROWS,
    SHARED,
    Making,
    Text,
    copy_of,
    fit,
    make_tasks,
    make_tokenizer,
    moved,
    read,
    rows_of,
    trained_pair,
)
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peft_moe_delta import MoeDeltaConfig, calibrate_routers, fit_identifier, fit_routers
from peft_moe_delta.calibration import Calibration
from peft_moe_delta.evaluation import bits_per_byte, exact_match

NEW = ("hu", "el")
LANGUAGES, UNNAMED = (ENGLISH, *NEW), "de"
EXPANSION_STEPS = 160
TASKS = 64
DOCUMENTS, CHARACTERS = 40, 600  # of every language, held out
FITTED = 150  # documents of a language that routers are calibrated on


@dataclass(frozen=True)
class Pair:
    """A base model and what tuning made of it.

    Attributes:
        base, tuned: two models of one architecture.
        tokenizer: of both, with a chat template.
        tasks: questions in the chat template with their answers, which the tuning did not use.
        texts: language -> training documents.
        held_out: language -> documents to score.
        moved: `||Delta|| / ||W||` of the embeddings.
    """

    base: PreTrainedModel
    tuned: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    tasks: list[dict[str, str]]
    texts: Text
    held_out: Text
    moved: float


def large_delta_pair(seed: int, family: str = "qwen3") -> Pair:
    """Train both models from nothing, on one core in about two minutes."""
    texts = {code: read(code, "train") for code in LANGUAGES}
    drawn = {code: random.Random(0).sample(read(code, "test"), DOCUMENTS) for code in (*LANGUAGES, UNNAMED)}
    held_out = {code: [document[:CHARACTERS] for document in documents] for code, documents in drawn.items()}
    tokenizer = make_tokenizer(texts)
    asked, tasks = make_tasks(tokenizer, texts[ENGLISH], seed, TASKS)
    base, tuned = trained_pair(Making(family), tokenizer, texts, asked, seed)
    return Pair(base, tuned, tokenizer, tasks, texts, held_out, moved(base, tuned))


def expanded(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Text, seed: int) -> PeftModel:
    """The base with an expert for each new language, expanded by language."""
    torch.manual_seed(seed)
    languages = {ENGLISH: "original", "hu": "hungarian", "el": "greek"}
    experts = {group: 1 for group in languages.values() if group != "original"}
    model = get_peft_model(
        copy_of(base), MoeDeltaConfig(languages=languages, experts=experts, routing="language", top_k=1)
    )
    rows = rows_of(tokenizer, texts, seed)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[dict[str, Any]]:
        for step in range(EXPANSION_STEPS):
            code = NEW[step % len(NEW)]
            ids = rows[code][torch.randint(len(rows[code]), (ROWS,), generator=generator)]
            yield {"input_ids": ids, "labels": ids, "language": code, "use_cache": False}

    fit(model, batches(), EXPANSION_STEPS, 4e-3)
    return model.eval()


@dataclass(frozen=True)
class Figures:
    """One way of routing one grafted model.

    Attributes:
        skill: share of the tuned tasks answered exactly.
        bits: bits per byte of held-out text, by language.
        right: share of tokens on the right experts in the worst source; None where nobody measured it.
    """

    skill: float
    bits: dict[str, float]
    right: float | None = None


def figures(model: Any, pair: Pair, *, told: bool = False, right: float | None = None) -> Figures:
    """Score a model; `told`: tell it each text's language, English of what it does not know."""

    def named(code: str) -> dict[str, str]:
        return {"language": ENGLISH if code == UNNAMED else code} if told else {}

    # Windows overlap: the models have learnt no longer ones, and text is rarely read from a cut.
    windows = {"max_length": LENGTH, "stride": LENGTH // 2}
    bits = {
        code: bits_per_byte(model, pair.tokenizer, documents, **windows, **named(code)).value
        for code, documents in pair.held_out.items()
    }
    return Figures(exact_match(model, pair.tokenizer, pair.tasks, **named(ENGLISH)).value, bits, right)


def run(seed: int, family: str) -> tuple[Pair, dict[str, Figures], Calibration]:
    """Every way of routing, from one random seed."""
    pair = large_delta_pair(seed, family)
    found = {"base": figures(pair.base, pair), "tuned": figures(pair.tuned, pair)}
    model = expanded(pair.base, pair.tokenizer, pair.texts, seed)
    model.base_model.start_review(routing="learned")
    fit_routers(model, {code: texts[:200] for code, texts in pair.texts.items()}, pair.tokenizer, max_length=LENGTH)
    grafted = model.graft(pair.tuned)
    with grafted.base_model.in_routing("language"):
        found["by language, told"] = figures(grafted, pair, told=True, right=1.0)
    today = figures(grafted, pair)
    texts = {code: documents[:FITTED] for code, documents in pair.texts.items()}
    recognised = fit_identifier(grafted, texts, pair.tokenizer).recognised
    with grafted.base_model.in_routing("context"):
        found["by context, read"] = figures(grafted, pair, right=min(recognised.values()))
    calibration = calibrate_routers(grafted, texts, pair.tokenizer, max_length=LENGTH, seed=seed)
    found["learned, as before the graft"] = replace(today, right=min(row.right for row in calibration.before))
    found["learned, calibrated"] = figures(grafted, pair, right=min(row.right for row in calibration.after))
    return pair, found, calibration


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean over random seeds, with the range."""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--family", choices=("qwen3", "llama"), nargs="+", default=["qwen3", "llama"])
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        print(f"skipped: no text in {SHARED}")
        return
    for family in arguments.family:
        runs = [run(seed, family) for seed in range(arguments.first, arguments.first + arguments.seeds)]
        moved = shown([pair.moved for pair, _, _ in runs])
        rows: list[Sequence[object]] = []
        for name in runs[0][1]:
            each = [found[name] for _, found, _ in runs]
            right = [one.right for one in each if one.right is not None]
            bits = [shown([one.bits[code] for one in each], 3) for code in (*LANGUAGES, UNNAMED)]
            rows.append((name, shown([one.skill for one in each]), *bits, shown(right) if right else ""))
        print_table(
            f"{family}, embeddings moved by {moved}: skill, bits per byte, share of tokens on the right experts",
            ("", "skill", *LANGUAGES, f"{UNNAMED}, unnamed", "right, worst source"),
            rows,
        )
        for seed, (_, _, calibration) in enumerate(runs, arguments.first):
            print(
                f"\n- seed {seed}: kept {calibration.kept}, weight {calibration.weight:g}; by weight, nats per token:"
            )
            for trial in calibration.curve:
                print(
                    f"  - {trial.weight:g}: original {trial.original_cost:.3f}, new {trial.new_cost:.3f}, "
                    f"{trial.answers:.0%} of answers kept"
                )
            for doubt in calibration.doubts:
                print(f"  - {doubt}")


if __name__ == "__main__":
    main()
