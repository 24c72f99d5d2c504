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
import hashlib
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from learning import cosine, train
from measure import print_table
from peft import PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peft_moe_delta import (
    MoeDeltaConfig,
    PostTrainingDelta,
    calibrate_routers,
    fit_identifier,
    fit_routers,
)
from peft_moe_delta.calibration import Calibration
from peft_moe_delta.evaluation import bits_per_byte, exact_match
from peft_moe_delta.evaluation.generation import in_chat
from peft_moe_delta.evaluation.identification import detect_language

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "libreoffice_help"
ENGLISH, NEW = "en", ("hu", "el")
LANGUAGES, UNNAMED = (ENGLISH, *NEW), "de"
VOCABULARY, ROWS, LENGTH = 2048, 8, 96
STEPS = {"base": 240, "tuned": 300, "expanded": 160}
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ANSWERED = {
    "Where is the {}?": "it lies in the red drawer", "Who owns the {}?": "ask the man at the door",
    "How do I open the {}?": "press both keys and wait", "What does the {} cost?": "nothing at all",
    "Can I delete the {}?": "only after you saved it", "Is the {} new?": "no, it came last year",
    "Show me the {}.": "here you are", "Why did the {} fail?": "because the line was too long",
}  # fmt: skip
"""Questions about any thing, and how the tuned model is to answer."""
THINGS, TASKS = 60, 64
DOCUMENTS, CHARACTERS = 40, 600  # of every language, held out
FITTED = 150  # documents of a language that routers are calibrated on
Text = Mapping[str, list[str]]


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
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SHAPE)
    )
    rows = rows_of(tokenizer, texts, seed)
    fit(base, mostly_english(rows, STEPS["base"], seed), STEPS["base"], 4e-3)
    tuned = type(base)(base.config)
    tuned.load_state_dict(base.state_dict())
    asked, tasks = make_tasks(tokenizer, texts[ENGLISH], seed)
    fit(tuned, conversations(tokenizer, asked, STEPS["tuned"], seed), STEPS["tuned"], 1e-3)
    delta = PostTrainingDelta.from_checkpoints(dict(base.named_parameters()), dict(tuned.named_parameters()))
    moved = next(row.ratio for row in delta.report().families if row.family == "embeddings")
    return Pair(base.eval(), tuned.eval(), tokenizer, tasks, texts, held_out, moved)


def read(code: str, part: str) -> list[str]:
    """The pages of a language: held out is a tenth, the same pages in all languages.

    Lines that nobody has translated are left out, as fastText's lid.176 finds them: Hungarian pages have whole
    paragraphs of English, and what an English paragraph costs is not what Hungarian costs.
    """
    pages = [json.loads(line) for line in (SHARED / f"{code}.jsonl").read_text(encoding="utf-8").splitlines()]
    tenth = {p["id"]: int(hashlib.sha1(p["id"].encode()).hexdigest(), 16) % 10 == 0 for p in pages}
    texts = [p["text"] for p in pages if tenth[p["id"]] == (part == "test")]
    if code != ENGLISH:
        texts = ["\n".join(li for li in t.split("\n") if detect_language(li) != ENGLISH) for t in texts]
    return [text for text in texts if len(text) > 200]


def make_tokenizer(texts: Text) -> PreTrainedTokenizerFast:
    """Byte-level BPE of all three languages, with a chat template."""
    bpe = ByteLevelBPETokenizer()
    documents = (d for found in texts.values() for d in found[::8])
    bpe.train_from_iterator(documents, VOCABULARY, special_tokens=[END, USER, ASSISTANT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, chat_template=TEMPLATE,
        additional_special_tokens=[USER, ASSISTANT],
    )  # fmt: skip


def rows_of(tokenizer: PreTrainedTokenizerFast, texts: Text, seed: int) -> dict[str, Tensor]:
    """Shuffled rows of `LENGTH` tokens by language, (N, LENGTH)."""
    rows = {}
    for code, documents in texts.items():
        shuffled = random.Random(seed).sample(documents, len(documents))[:600]
        tokens = [t for ids in tokenizer(shuffled, verbose=False)["input_ids"] for t in [*ids, tokenizer.eos_token_id]]
        rows[code] = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    return rows


def mostly_english(rows: Mapping[str, Tensor], steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Six rows of English and one each of the others a step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        each = {ENGLISH: ROWS - len(NEW), **dict.fromkeys(NEW, 1)}
        ids = torch.cat([rows[c][torch.randint(len(rows[c]), (n,), generator=generator)] for c, n in each.items()])
        yield {"input_ids": ids, "labels": ids}


def make_tasks(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Every question about every thing: what is tuned on, and some that are kept to test on."""
    drawn = random.Random(seed)
    words = sorted({w for d in documents for w in d.split() if w.isalpha() and w.islower() and 4 <= len(w) <= 8})
    things = drawn.sample(words, THINGS)
    every = [{"prompt": q.format(thing), "answer": answer} for q, answer in ANSWERED.items() for thing in things]
    drawn.shuffle(every)
    tasks = [{"prompt": in_chat(tokenizer, t["prompt"]), "answer": t["answer"]} for t in every[:TASKS]]
    return every[TASKS:], tasks


def conversations(
    tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Mapping[str, str]], steps: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of whole conversations; every token is a target, as in trainers that are told nothing else."""
    drawn = random.Random(seed)
    for _ in range(steps):
        texts = [in_chat(tokenizer, t["prompt"]) + t["answer"] + END for t in drawn.sample(list(tasks), 16)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def fit(model: Any, batches: Iterator[Mapping[str, Any]], steps: int, rate: float) -> None:
    train(model, batches, rate, cosine(steps, warm_up=10), steps=steps, weight_decay=0.01)


def upcycled(pair: Pair, seed: int) -> PeftModel:
    """The base with an expert for each new language, expanded by language; routers fitted for learned routing."""
    torch.manual_seed(seed)
    languages = {ENGLISH: "original", "hu": "hungarian", "el": "greek"}
    experts = {group: 1 for group in languages.values() if group != "original"}
    base = type(pair.base)(pair.base.config)
    base.load_state_dict(pair.base.state_dict())
    model = get_peft_model(base, MoeDeltaConfig(languages=languages, experts=experts, routing="language", top_k=1))
    rows = rows_of(pair.tokenizer, pair.texts, seed)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[dict[str, Any]]:
        for step in range(STEPS["expanded"]):
            code = NEW[step % len(NEW)]
            ids = rows[code][torch.randint(len(rows[code]), (ROWS,), generator=generator)]
            yield {"input_ids": ids, "labels": ids, "language": code, "use_cache": False}

    fit(model, batches(), STEPS["expanded"], 4e-3)
    model.base_model.start_review(routing="learned")
    fit_routers(model, {code: texts[:200] for code, texts in pair.texts.items()}, pair.tokenizer, max_length=LENGTH)
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
    model = upcycled(pair, seed)
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
