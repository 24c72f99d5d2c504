"""A base model and what tuning made of it, from nothing and small enough for a processor: what benchmarks graft.

In: text of several languages. Out: a model of about a million parameters that was pre-trained on it, mostly on English;
the same one tuned on conversations; their tokenizer; questions to ask. How far tuning moves the weights is a setting.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from learning import cosine, train
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peft_moe_delta import PostTrainingDelta
from peft_moe_delta.evaluation.generation import in_chat
from peft_moe_delta.evaluation.identification import detect_language

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "libreoffice_help"
ENGLISH = "en"
VOCABULARY, ROWS, LENGTH = 2048, 8, 96
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
THINGS = 60
Text = Mapping[str, list[str]]
Tasks = list[dict[str, str]]


@dataclass(frozen=True)
class Making:
    """How a pair comes about.

    Attributes:
        family: the models' type, "qwen3" or "llama".
        base_steps: of pre-training.
        foreign_rows: of the 8 rows of a step, how many are of the other languages, which take turns.
        tuned_steps, tuned_rate: of tuning.
        replay: whether every second step of tuning reads pre-training text, as post-training that forgets nothing does;
            without it the delta is large.
        shape: what differs from `SHAPE`.
    """

    family: str = "qwen3"
    base_steps: int = 240
    foreign_rows: int = 2
    tuned_steps: int = 300
    tuned_rate: float = 1e-3
    replay: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)

    def new_model(self, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedModel:
        """A model of the pair's shape, but for `changes`, with random weights."""
        shape = {**SHAPE, **self.shape, **changes}
        config = AutoConfig.for_model(
            self.family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape
        )
        return AutoModelForCausalLM.from_config(config)


def trained_pair(
    making: Making, tokenizer: PreTrainedTokenizerFast, texts: Text, conversations: Tasks, seed: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Pre-train a base on all texts and tune a copy of it on conversations; one core takes a minute or two."""
    torch.manual_seed(seed)
    base = making.new_model(tokenizer)
    rows = rows_of(tokenizer, texts, seed)
    fit(base, mostly_english(rows, making.base_steps, seed, making.foreign_rows), making.base_steps, 4e-3)
    tuned = copy_of(base)
    steps = making.tuned_steps
    batches = chats(tokenizer, conversations, steps, seed)
    if making.replay:
        batches = in_turn(batches, mostly_english(rows, steps, seed + 1, making.foreign_rows))
    fit(tuned, islice(batches, steps), steps, making.tuned_rate)
    return base.eval(), tuned.eval()


def in_turn(*sources: Iterator[Any]) -> Iterator[Any]:
    """One of each, again and again."""
    return chain.from_iterable(zip(*sources, strict=True))


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose weights may change."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def moved(base: PreTrainedModel, tuned: PreTrainedModel, family: str = "embeddings") -> float:
    """`||Delta|| / ||W||` of a family of weights."""
    weights = [{name: weight.detach() for name, weight in model.named_parameters()} for model in (base, tuned)]
    delta = PostTrainingDelta.from_checkpoints(*weights)
    return next(row.ratio for row in delta.report().families if row.family == family)


def read(code: str, part: str, folder: Path | None = None) -> list[str]:
    """The pages of a language: held out is a tenth, the same pages in all languages.

    Lines that nobody has translated are left out, as fastText's lid.176 finds them: Hungarian pages have whole
    paragraphs of English, and what an English paragraph costs is not what Hungarian costs.
    """
    file = (folder or SHARED) / f"{code}.jsonl"
    pages = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tenth = {p["id"]: int(hashlib.sha1(p["id"].encode()).hexdigest(), 16) % 10 == 0 for p in pages}
    texts = [p["text"] for p in pages if tenth[p["id"]] == (part == "test")]
    if code != ENGLISH:
        texts = ["\n".join(li for li in t.split("\n") if detect_language(li) != ENGLISH) for t in texts]
    return [text for text in texts if len(text) > 200]


def make_tokenizer(texts: Text) -> PreTrainedTokenizerFast:
    """Byte-level BPE of all languages, with a chat template."""
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


def mostly_english(
    rows: Mapping[str, Tensor], steps: int, seed: int, foreign_rows: int = 2
) -> Iterator[dict[str, Tensor]]:
    """Rows of English, and `foreign_rows` of the other languages, which take turns."""
    generator = torch.Generator().manual_seed(seed)
    others = [code for code in rows if code != ENGLISH]
    for step in range(steps):
        turns = [others[(step * foreign_rows + i) % len(others)] for i in range(foreign_rows)]
        each = {ENGLISH: ROWS - foreign_rows, **{code: turns.count(code) for code in turns}}
        ids = torch.cat([rows[c][torch.randint(len(rows[c]), (n,), generator=generator)] for c, n in each.items()])
        yield {"input_ids": ids, "labels": ids}


def make_tasks(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], seed: int, held_out: int
) -> tuple[Tasks, Tasks]:
    """Every question about every thing that the documents name: what is tuned on, and some that are kept to test on."""
    drawn = random.Random(seed)
    words = sorted({w for d in documents for w in d.split() if w.isalpha() and w.islower() and 4 <= len(w) <= 8})
    things = drawn.sample(words, THINGS)
    every = [{"prompt": q.format(thing), "answer": answer} for q, answer in ANSWERED.items() for thing in things]
    drawn.shuffle(every)
    tasks = [{"prompt": in_chat(tokenizer, t["prompt"]), "answer": t["answer"]} for t in every[:held_out]]
    return every[held_out:], tasks


def chats(
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
    """AdamW with a cosine down to a twentieth of the rate."""
    train(model, batches, rate, cosine(steps, warm_up=10), steps=steps, weight_decay=0.01)
