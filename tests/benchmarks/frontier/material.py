"""What the study trains on and scores: text of two domains, questions, and pairs of models.

In: LibreOffice's help, which is beside the repository, and Home Assistant's interface, which examples/demo_inputs.py
makes. Out: `Material`, the same for every random seed; and for each seed and kind of delta a `Pair`, kept in a folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pairs import (
    ENGLISH,
    ROWS,
    Making,
    Tasks,
    Text,
    make_tasks,
    make_tokenizer,
    moved,
    read,
    rows_of,
    trained_pair,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peft_moe_delta.sources import read_texts

NEW, UNNAMED = ("hu", "el", "ru"), "de"
CHARACTERS = 300  # of a held-out document
DOCUMENTS = {"validation": 20, "test": 40, "other": 40}
"""Held out of each language; "other" is of the other domain."""
QUESTIONS = {"validation": 48, "test": 64}
"""Of each language, too."""

USUAL = {"base_steps": 500, "foreign_rows": 1, "tuned_steps": 400, "tuned_rate": 5e-4, "replay": True}
LARGE = {"base_steps": 500, "foreign_rows": 1, "tuned_steps": 300, "tuned_rate": 1e-3}
PAIRS: Mapping[str, Making] = {
    "qwen3": Making("qwen3", **USUAL),
    "llama": Making("llama", **USUAL),
    "qwen3-large-delta": Making("qwen3", **LARGE),
}


@dataclass(frozen=True)
class HeldOut:
    """Documents by language, and questions that the tuned model can be asked about things named in each language."""

    texts: Text
    tasks: Mapping[str, Tasks]


@dataclass(frozen=True, eq=False)
class Material:
    """Text and questions.

    Attributes:
        tokenizer: of all languages, with a chat template.
        train: language -> documents to train on; English and the new languages.
        conversations: what the post-trained models are tuned on.
        held_out: "validation", "test" and "other", each of documents that are in none of the others.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Text
    conversations: Tasks
    held_out: Mapping[str, HeldOut]

    @property
    def new(self) -> list[str]:
        """The languages to be learnt."""
        return [code for code in self.train if code != ENGLISH]

    def new_text(self, steps: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        """A batch of one new language a step, in turn: every method reads the same tokens in the same order."""
        rows = rows_of(self.tokenizer, {code: self.train[code] for code in self.new}, seed)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            code = self.new[step % len(self.new)]
            yield code, rows[code][torch.randint(len(rows[code]), (ROWS,), generator=generator)]

    def all_text(self, steps: int, seed: int) -> Iterator[tuple[list[str], Tensor]]:
        """Batches of English and new languages in equal parts, each row with its language: what a review reads."""
        rows = rows_of(self.tokenizer, self.train, seed)
        generator = torch.Generator().manual_seed(seed)
        codes = [[ENGLISH, self.new[i // 2 % len(self.new)]][i % 2] for i in range(ROWS)]
        for _ in range(steps):
            picked = [rows[c][torch.randint(len(rows[c]), (1,), generator=generator)] for c in codes]
            yield codes, torch.cat(picked)

    def sizes(self) -> dict[str, dict[str, list[int]]]:
        """Bytes of every held-out document, by part and language."""
        return {
            part: {code: [len(d.encode()) for d in documents] for code, documents in held.texts.items()}
            for part, held in self.held_out.items()
        }


@dataclass(frozen=True, eq=False)
class Pair:
    """A base model and its post-trained descendant.

    Attributes:
        making: how they came about.
        base, tuned: the models; methods work on copies.
        digest: of their weights, by which runs of one pair are told from those of another.
        moved: `||Delta|| / ||W||` of the embeddings.
    """

    making: Making
    base: PreTrainedModel
    tuned: PreTrainedModel
    digest: str
    moved: float


@cache
def material(shared: Path, interface: Path) -> Material:
    """Read once a process: telling translated lines from others takes a while.

    Args:
        shared: the folder of LibreOffice's help.
        interface: the folder of Home Assistant's interface, `<language>/test.jsonl`.
    """
    train = {code: read(code, "train", shared) for code in (ENGLISH, *NEW)}
    texts: dict[str, dict[str, list[str]]] = {part: {} for part in DOCUMENTS}
    for code in (ENGLISH, *NEW, UNNAMED):
        pages = read(code, "test", shared)
        drawn = random.Random(0).sample(pages, DOCUMENTS["validation"] + DOCUMENTS["test"])
        if code != UNNAMED:  # which nothing is chosen by
            texts["validation"][code] = drawn[: DOCUMENTS["validation"]]
        texts["test"][code] = drawn[DOCUMENTS["validation"] :]
        texts["other"][code] = random.Random(0).sample(read_texts(interface / code / "test.jsonl"), DOCUMENTS["other"])
    return material_of(train, texts)


def material_of(train: Text, texts: Mapping[str, Text], tokenizer: PreTrainedTokenizerFast | None = None) -> Material:
    """Cut held-out documents to size, and make questions."""
    tokenizer = tokenizer or make_tokenizer(train)
    asked = {code: make_tasks(tokenizer, documents, 0, sum(QUESTIONS.values())) for code, documents in train.items()}
    first = QUESTIONS["validation"]
    tasks = {
        "validation": {code: kept[:first] for code, (_, kept) in asked.items()},
        "test": {code: kept[first:] for code, (_, kept) in asked.items()},
    }
    held_out = {
        part: HeldOut({c: [d[:CHARACTERS] for d in documents] for c, documents in found.items()}, tasks.get(part, {}))
        for part, found in texts.items()
    }
    return Material(tokenizer, train, asked[ENGLISH][0], held_out)


def pair(name: str, seed: int, text: Callable[[], Material], folder: Path) -> Pair:
    """The pair of a name and seed: from `folder`, or trained and kept there, whole or not at all."""
    kept = folder / f"{name}-{seed}"
    if not kept.is_dir():
        partial = kept.with_name(f"{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        found = text()
        models = trained_pair(PAIRS[name], found.tokenizer, found.train, found.conversations, seed)
        for which, model in zip(("base", "tuned"), models, strict=True):
            model.save_pretrained(partial / which)
        partial.rename(kept)
    base, tuned = (AutoModelForCausalLM.from_pretrained(kept / which).eval() for which in ("base", "tuned"))
    return pair_of(PAIRS[name], base, tuned)


def pair_of(making: Making, base: Any, tuned: Any) -> Pair:
    """Two models as a pair."""
    digest = hashlib.sha256()
    for model in (base, tuned):
        for weight in model.parameters():
            digest.update(weight.detach().numpy().tobytes())
    return Pair(making, base, tuned, digest.hexdigest()[:12], round(moved(base, tuned), 3))


def digest_of(sizes: Mapping[str, Any]) -> str:
    """Of the held-out documents' sizes: whether two runs scored the same documents."""
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]


def codes_of(held: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """New languages of what was scored: neither English nor the unnamed one."""
    return [code for code in held if code not in (ENGLISH, UNNAMED)]
