"""The model cards as a step: what the recipe and its finished steps say, for the stock checkpoint and for its adapter.

In: the steps of a recipe and the report. Out: a folder for each model with its card and the JSON it is rendered from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.report import EvalReport
from ..hub import CardFacts, licence_for, licence_of, write_card
from ..hub.card import public_name
from ..program import called
from .fields import Card, Recipe, Training, Tuning
from .reporting import OURS
from .workspace import LOG_FILE, RECORD, Step


def write(
    recipe: Recipe,
    card: Card,
    output: Path,
    *,
    adapter: Step,
    grafted: Step,
    stages: Mapping[str, Step],
    report: EvalReport,
) -> list[Path]:
    """Write both cards. Returns their folders, the stock checkpoint's first.

    Raises:
        CardError: the recipe claims a licence that is laxer than a parent's.
    """
    base, post_trained, parents = _parents(recipe, card)
    written = json.loads((grafted.folder / RECORD).read_text(encoding="utf-8"))
    said: dict[str, Any] = {
        "data": card.data,
        "limits": card.limits,
        "command": [called(), *map(_shown, sys.argv[1:])],
        "versions": written["versions"],
        "base_model": base,
        "parents": parents,
        "licence": card.licence,
    }
    model = CardFacts.of(
        grafted.folder,
        name=card.name,
        adapter=adapter.folder,
        post_trained=post_trained,
        training=_training(recipe, stages),
        measured_as=OURS,
        **said,
    )
    only_experts = {name: step for name, step in stages.items() if name != "post-training"}
    of_adapter = CardFacts.of(
        adapter.folder, name=f"{card.name}-adapter", training=_training(recipe, only_experts), **said
    )
    write_card(output / model.name, model, report)
    write_card(output / of_adapter.name, of_adapter)
    return [output / model.name, output / of_adapter.name]


def check_card(recipe: Recipe, card: Card) -> None:
    """Refuse what the card may not say, before anything is made.

    Raises:
        CardError: the recipe claims a licence that is laxer than a parent's.
    """
    base, post_trained, parents = _parents(recipe, card)
    licence_for({name: parents[name] for name in (base, post_trained)}, card.licence)


def _parents(recipe: Recipe, card: Card) -> tuple[str, str, dict[str, str | None]]:
    """What base and post-trained model are called, and every parent's licence as far as it is known."""
    base = card.base_model or recipe.model
    post_trained = card.post_trained or recipe.post_trained or "post-trained"
    parents: dict[str, str | None] = {base: licence_of(recipe.model), **card.parents}
    if post_trained not in parents:  # one that the recipe makes from the base stands under the base's licence
        parents[post_trained] = parents[base] if recipe.post_trained is None else licence_of(recipe.post_trained)
    return base, post_trained, parents


def _training(recipe: Recipe, stages: Mapping[str, Step]) -> list[dict[str, Any]]:
    """One row for each run of the Trainer that this model went through."""
    fields: dict[str, Training | None] = {
        "post-training": recipe.tune,
        "expansion": recipe.expand,
        "review": recipe.review,
    }
    return [_row(name, ran, step) for name, step in stages.items() if (ran := fields[name]) is not None]


def _row(stage: str, fields: Training, step: Step) -> dict[str, Any]:
    log = step.folder / LOG_FILE
    lines = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "stage": stage,
        "steps": fields.steps,
        "batch_size": fields.sequences // fields.steps,
        "sequence_length": None if isinstance(fields, Tuning) else fields.sequence_length,  # a task has its own
        "learning_rate": fields.learning_rate,
        **({"first_loss": round(losses[0], 3), "last_loss": round(losses[-1], 3)} if losses else {}),
    }


def _shown(argument: str) -> str:
    """An argument of the command line without the folders of this machine."""
    return public_name(argument) if Path(argument).is_absolute() else argument
