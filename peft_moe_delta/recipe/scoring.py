"""Measuring one checkpoint of a recipe, and its routes before and after the graft.

In: a checkpoint, or an adapter and what it became. Out: a file of findings that the report is made of.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import TaskSet
from ..evaluation.forward import Progress
from ..evaluation.loading import Measured
from ..evaluation.measure import measure
from ..evaluation.routes import expert_names, route_drift
from ..evaluation.scoring import Material, Scores, score_material
from ..hub.card import GRAFT_FILE, doubts_of
from ..languages import ORIGINAL_GROUP, closest_code
from ..loading import load_adapter, load_tokenizer
from ..sources import read_tasks
from ..tuner import MoeDeltaTuner
from .data import held_out
from .fields import Recipe
from .stages import load_made, load_model

FINDINGS, DRIFT = "findings.json", "drift.json"
CHAT_FILE = "conversations.json"
"""Beside a grafted checkpoint: conversations that the post-trained model made up."""
_BATCH = 4  # texts a pass: more leave the processor's caches
_PROMPTS = 2  # of each set of tasks
_BEGINNING = 60  # characters of a document that models continue
_WRITTEN = 24  # tokens of each continuation
_DRIFT_TEXTS, _DRIFT_CHARACTERS = 8, 1500  # of each language


def material_of(recipe: Recipe) -> Material:
    """The held-out text and tasks; and prompts by language that has a group: a beginning of a document, and prompts of
    tasks in it."""
    texts = {
        code: held_out(language.test, code, recipe.limits, recipe.limits.test_documents, recipe.seed)
        for code, language in recipe.languages.items()
    }
    unseen = {
        code: held_out(file, code, recipe.limits, recipe.limits.test_documents, recipe.seed)
        for code, file in recipe.unseen.items()
    }
    tasks = {
        name: TaskSet(read_tasks(tasks.test, recipe.limits.test_tasks), tasks.language)
        for name, tasks in recipe.tasks.items()
    }
    prompts = {code: [max(found, key=len)[:_BEGINNING].rsplit(" ", 1)[0]] for code, found in texts.items()}
    for listed in tasks.values():
        if listed.language and (code := closest_code(listed.language, prompts)):
            prompts[code] += [task["prompt"] for task in listed.tasks[:_PROMPTS]]
    return Material(texts=texts | unseen, tasks=tasks, prompts=prompts)


def score(recipe: Recipe, name: str, checkpoint: Path | str, folder: Path) -> None:
    """Measure a checkpoint in a stock architecture."""
    model, tokenizer = ready(load_made(checkpoint, recipe), recipe), load_tokenizer(checkpoint)
    with arithmetic(recipe):
        found = measure(
            Measured(model, tokenizer, str(checkpoint)),
            name,
            material_of(recipe),
            batch_size=_BATCH,
            max_new_tokens=_WRITTEN,
            bar=bar,
        )
    found.save(folder / FINDINGS)


def drift(recipe: Recipe, name: str, base: Path | str, adapter: Path, grafted: Path, folder: Path) -> None:
    """Where the grafted model sends tokens, against its adapter before the graft: held-out text, tasks, and chat."""
    before = load_adapter(load_model(base), adapter)
    after = Measured(ready(load_made(grafted, recipe), recipe), load_tokenizer(grafted), None)
    material = material_of(recipe)
    texts = {
        code: [document[:_DRIFT_CHARACTERS] for document in found[:_DRIFT_TEXTS]]
        for code, found in material.texts.items()
    }
    asked: dict[str, list[str]] = {}
    for tasks in material.tasks.values():
        if tasks.language is not None:
            asked.setdefault(tasks.language, []).extend(t["prompt"] + t["answer"] for t in tasks.tasks[:_DRIFT_TEXTS])
    originals = [code for code, language in recipe.languages.items() if language.group == ORIGINAL_GROUP]
    chat = json.loads((grafted / CHAT_FILE).read_text(encoding="utf-8"))
    spoken = {originals[0]: chat} if originals and chat else {}
    names = (name, "its adapter before the graft")
    with arithmetic(recipe):
        rows = [
            row
            for kind, listed in (("text", texts), ("tasks", asked), ("chat", spoken))
            for row in route_drift(Measured(before, after.tokenizer, None), after, listed, names=names, kind=kind)
        ]
    tuner: Any = before.base_model
    assert isinstance(tuner, MoeDeltaTuner)
    plan = tuner.plan()
    experts = expert_names(plan.groups, [max(counts) for counts in zip(*plan.counts, strict=True)])
    graft = json.loads((grafted / GRAFT_FILE).read_text(encoding="utf-8"))
    kept = {"agreement": [asdict(row) for row in rows], "experts": experts, "doubts": doubts_of(graft)}
    (folder / DRIFT).write_text(json.dumps(kept), encoding="utf-8")


def scores_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    recipe: Recipe,
) -> Scores:
    """Score a model as the recipe computes."""
    with arithmetic(recipe):
        measured = Measured(model, tokenizer, None)
        return score_material(measured, material, batch_size=_BATCH, bar=lambda label: bar(f"validation, {label}"))


def bar(label: str) -> Progress:
    """What shows how far a part of a step is, for as long as it takes."""
    return partial(tqdm, desc=label, leave=False)


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
