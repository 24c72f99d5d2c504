"""Scoring one checkpoint on all held-out material of a recipe.

In: a checkpoint. Out: `scores.json`: bits and bytes of every document by language, 0 or 1 for every task;
and how many tokens of text a second took.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import TaskScore, TaskSet, TextScore
from ..evaluation.forward import Progress
from ..evaluation.loading import Measured
from ..evaluation.scoring import Material, Scores, score_material
from ..loading import load_tokenizer
from .data import held_out, read_tasks
from .fields import Recipe
from .stages import load_made

FILE = "scores.json"
_TEXT = {"max_length": 512, "stride": 512, "batch_size": 4}  # every token once, in windows without overlap
_TASKS = {"batch_size": 64}  # tasks are short; a larger batch leaves the processor's caches


def score(recipe: Recipe, checkpoint: Path | str, folder: Path) -> None:
    """Score a checkpoint in a stock architecture."""
    material = Material(
        texts={
            code: held_out(language.test, recipe.limits, recipe.limits.test_documents, recipe.seed)
            for code, language in recipe.languages.items()
        },
        tasks={
            name: TaskSet(read_tasks(tasks.test, recipe.limits.test_tasks), tasks.language)
            for name, tasks in recipe.tasks.items()
        },
    )
    model, tokenizer = ready(load_made(checkpoint, recipe), recipe), load_tokenizer(checkpoint)
    scores = scores_of(model, tokenizer, material, recipe, lambda label: partial(tqdm, desc=label, leave=False))
    kept = {
        "text": {code: {"bits": s.bits.tolist(), "bytes": s.bytes.tolist()} for code, s in scores.texts.items()},
        "tasks": {name: s.correct.tolist() for name, s in scores.tasks.items()},
        "tokens_per_second": scores.tokens_per_second,
    }
    (folder / FILE).write_text(json.dumps(kept), encoding="utf-8")


def read_scores(folder: Path) -> Scores:
    """What `score` has kept there."""
    kept: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return Scores(
        texts={code: TextScore(np.array(s["bits"]), np.array(s["bytes"])) for code, s in kept["text"].items()},
        tasks={name: TaskScore(np.array(correct)) for name, correct in kept["tasks"].items()},
        tokens_per_second=kept.get("tokens_per_second"),
    )


def scores_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    recipe: Recipe,
    bar: Callable[[str], Progress | None] = lambda label: None,
) -> Scores:
    """Score a model as the recipe computes."""
    with arithmetic(recipe):
        measured = Measured(model, tokenizer, None)
        return score_material(measured, material, text_options=_TEXT, task_options=_TASKS, bar=bar)


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
