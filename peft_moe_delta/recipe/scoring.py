"""Scoring one checkpoint on all held-out material of a recipe.

In: a checkpoint. Out: `scores.json`: bits and bytes of every document by language, 0 or 1 for every task;
and how many tokens of text a second took.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from ..evaluation import bits_per_byte, exact_match
from ..evaluation.forward import Progress
from .data import read_tasks, read_texts
from .fields import Recipe
from .stages import load_model

FILE = "scores.json"
_WINDOW = 512

score_texts = partial(bits_per_byte, max_length=_WINDOW, stride=_WINDOW, batch_size=4)
"""Bits per byte, every token once, in windows without overlap."""

score_tasks = partial(exact_match, batch_size=128)
"""Exact match in large batches: tasks are short."""


def score(recipe: Recipe, checkpoint: Path | str, folder: Path) -> None:
    """Score a checkpoint in a stock architecture."""
    model, tokenizer = ready(load_model(checkpoint), recipe), AutoTokenizer.from_pretrained(checkpoint)
    scores: dict[str, Any] = {"text": {}, "tasks": {}}
    seconds, tokens = 0.0, 0
    with arithmetic(recipe):
        for code, language in recipe.languages.items():
            texts = read_texts(language.test, recipe.limits.test_bytes)
            started = time.perf_counter()
            result = score_texts(model, tokenizer, texts, progress=_bar(f"{code} text"))
            seconds += time.perf_counter() - started
            tokens += sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
            scores["text"][code] = {"bits": result.bits.tolist(), "bytes": result.bytes.tolist()}
        for name, tasks in recipe.tasks.items():
            listed = read_tasks(tasks.test, recipe.limits.test_tasks)
            scores["tasks"][name] = score_tasks(model, tokenizer, listed, progress=_bar(name)).correct.tolist()
    scores["tokens_per_second"] = tokens / seconds
    (folder / FILE).write_text(json.dumps(scores), encoding="utf-8")


def ready(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Experts as fast as they go on a CPU, with the same arithmetic.

    transformers runs an expert at a time ("eager") faster than all in one grouped product there; and of an expert's
    weights, slices of one tensor, autocast keeps no rounded copy as it does of other weights.
    """
    if model.device.type == "cpu" and hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
        for parameter in model.parameters():
            if parameter.dim() == 3 and recipe.precision == "bf16":
                parameter.data = parameter.data.bfloat16()
    return model


def arithmetic(recipe: Recipe) -> torch.autocast:
    """The precision the recipe computes in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


def _bar(label: str) -> Progress:
    return partial(tqdm, desc=label, leave=False)
