"""A recipe small enough to run whole in seconds: a pico model, a byte tokenizer, text and tasks on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from builders import pico

SENTENCES = {
    "en": "the quick brown fox jumps over the lazy dog",
    "hu": "egy tucat kolt kitart minden zord szelben",
    "el": "ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, with special tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{{ messages }}",
    )


def pico_model() -> PreTrainedModel:
    """A pico model for that tokenizer."""
    return pico(vocab_size=len(pico_tokenizer()), max_position_embeddings=1024)


def pico_recipe(folder: Path) -> dict[str, Any]:
    """The fields of a recipe whose files exist."""
    pico_tokenizer().save_pretrained(folder / "model")
    pico_model().save_pretrained(folder / "model")
    languages = {}
    for code, sentence in SENTENCES.items():
        languages[code] = {"group": "original" if code == "en" else f"{code}_group"}
        for split, number in (("train", 40), ("validation", 2), ("test", 4)):
            documents = [{"text": f"{sentence} {index}"} for index in range(number)]
            languages[code][split] = write_lines(folder / f"{code}.{split}.jsonl", documents)
    tasks = write_lines(folder / "tasks.jsonl", [{"prompt": f"say {n}:", "answer": f" {n}"} for n in range(12)])
    training = {"steps": 2, "batch_size": 4, "learning_rate": 1.0e-3, "sequence_length": 16}
    return {
        "model": str(folder / "model"),
        "output": str(folder / "run"),
        "languages": languages,
        "adapter": {"experts": {"hu_group": 1, "el_group": 1}, "routing": "language"},
        "tune": {"tasks": tasks, "steps": 2, "batch_size": 4, "learning_rate": 1.0e-3},
        "expand": training,
        "review": {"routing": "learned", **training},
        "dense": training,
        "graft": {"expert_scale": "auto"},
        "calibrate": {"documents": 6, "conversations": 4, "steps": 1},
        "tasks": {"saying": {"validation": tasks, "test": tasks}},
        "limits": {"validation_tasks": 4},
        "card": {"name": "pico", "base_model": "org/base", "parents": {"org/base": "mit"}},
        "quick": {"expand": {"steps": 1}},
        "precision": "fp32",
    }
