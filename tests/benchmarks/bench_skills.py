"""Two post-trainings on one expansion: do both skills survive when their deltas are added up and grafted at once?

    python tests/benchmarks/bench_skills.py --seeds 3

For each random seed a small base is pre-trained on English with a little Hungarian and Greek, and tuned three times:
to answer one half of the questions, the other half, and both. The base learns Hungarian and Greek, an expert each,
routed by language. Each delta becomes a file, `combine_deltas` adds files up, `apply_delta` puts the sum over the base,
and the experts are grafted onto that, told each text's language. A skill is the share of held-out questions answered
exactly; text is in bits per byte. The text is that of ../shared; without it there is nothing to do.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_context import CHARACTERS, DOCUMENTS, LANGUAGES, expanded, shown
from measure import print_table
from pairs import (
    ANSWERED,
    ENGLISH,
    LENGTH,
    SHARED,
    Making,
    Tasks,
    Text,
    chats,
    copy_of,
    fit,
    in_turn,
    make_tasks,
    make_tokenizer,
    mostly_english,
    read,
    rows_of,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peft_moe_delta import PostTrainingDelta
from peft_moe_delta.evaluation import bits_per_byte, exact_match
from peft_moe_delta.graft.apply import apply_delta
from peft_moe_delta.graft.stored import combine_deltas

MAKING = Making("qwen3", base_steps=500, tuned_steps=400, tuned_rate=5e-4, replay=True)
HALVES = {"first": tuple(ANSWERED.values())[::2], "second": tuple(ANSWERED.values())[1::2]}
SUMS = {"first": (1.0, 0.0), "second": (0.0, 1.0), "first + second": (1.0, 1.0), "half of each": (0.5, 0.5)}
HELD_OUT = 128  # questions of both halves
Row = list[float]


def texts() -> tuple[Text, Text]:
    """To train on, and to score."""
    drawn = {code: random.Random(0).sample(read(code, "test"), DOCUMENTS) for code in LANGUAGES}
    held_out = {code: [document[:CHARACTERS] for document in documents] for code, documents in drawn.items()}
    return {code: read(code, "train") for code in LANGUAGES}, held_out


def tuned(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Mapping[str, torch.Tensor], asked: Tasks, seed: int
) -> PreTrainedModel:
    """A copy of the base that answers these questions; every second step reads pre-training text."""
    model, steps = copy_of(base), MAKING.tuned_steps
    batches = in_turn(
        chats(tokenizer, asked, steps, seed), mostly_english(rows, steps, seed + 1, MAKING.foreign_rows)
    )  # fmt: skip
    fit(model, islice(batches, steps), steps, MAKING.tuned_rate)
    return model.eval()


def run(seed: int, train: Text, held_out: Text, folder: Path) -> dict[str, Row]:
    """Every row of one random seed: both skills, then text by language."""
    tokenizer = make_tokenizer(train)
    asked, kept = make_tasks(tokenizer, train[ENGLISH], seed, HELD_OUT)
    halves = {name: [task for task in kept if task["answer"] in answers] for name, answers in HALVES.items()}

    def row(model: Any, **named: Any) -> Row:
        windows = {"max_length": LENGTH, "stride": LENGTH // 2}
        told = {code: {name: code for name in named} for code in held_out}
        skills = [exact_match(model, tokenizer, tasks, **told[ENGLISH]).value for tasks in halves.values()]
        text = [bits_per_byte(model, tokenizer, d, **windows, **told[code]).value for code, d in held_out.items()]
        return [*skills, *text]

    torch.manual_seed(seed)
    base, rows = MAKING.new_model(tokenizer), rows_of(tokenizer, train, seed)
    fit(base, mostly_english(rows, MAKING.base_steps, seed, MAKING.foreign_rows), MAKING.base_steps, 4e-3)
    base.save_pretrained(folder / "base")
    model = expanded(base, tokenizer, train, seed)
    both = tuned(base, tokenizer, rows, asked, seed)
    found = {"tuned on both": row(both), "the same, grafted": row(model.graft(both), language=True)}
    for name, answers in HALVES.items():
        one = tuned(base, tokenizer, rows, [task for task in asked if task["answer"] in answers], seed)
        PostTrainingDelta.from_checkpoints(base.state_dict(), one.state_dict()).save(folder / f"{name}.safetensors")
    for name, shares in SUMS.items():
        parts = [(folder / f"{half}.safetensors", share) for half, share in zip(HALVES, shares, strict=True) if share]
        combine_deltas(parts, folder / "sum.safetensors", torch.float32)
        apply_delta(folder / "sum.safetensors", folder / "base", folder / "sum", overwrite=True)
        post_trained = AutoModelForCausalLM.from_pretrained(folder / "sum").eval()
        found[f"delta: {name}"] = row(post_trained)
        found[f"delta: {name}, grafted"] = row(model.graft(post_trained), language=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        print(f"skipped: no text in {SHARED}")
        return
    train, held_out = texts()
    each = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            each.append(run(seed, train, held_out, Path(folder)))
    rows: list[Sequence[object]] = [
        (name, *(shown([found[name][column] for found in each], 3) for column in range(2 + len(held_out))))
        for name in each[0]
    ]
    print_table(
        "Skills (share of questions answered exactly) and bits per byte; experts are told the language",
        ("", "first skill", "second skill", *held_out),
        rows,
    )


if __name__ == "__main__":
    main()
