"""Arguments of Hugging Face's `Trainer`: those that a recipe sets, and whatever else its `trainer` sections say.

In: a training's fields. Out: `TrainingArguments`, or an error that names the field.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import RecipeError
from ..kinds import did_you_mean
from .fields import Training

_OURS = {
    "output_dir": "output", "max_steps": "steps", "num_train_epochs": "steps", "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size", "seed": "seed", "bf16": "precision", "fp16": "precision",
    "save_strategy": None, "save_steps": None, "eval_strategy": None, "remove_unused_columns": None,
}  # fmt: skip
"""Arguments that a recipe decides, and its own field for each; None where a step does what it does in one piece."""


def check_trainer(name: str, fields: Training) -> None:
    """Refuse what `TrainingArguments` does not know, or what the recipe says elsewhere.

    Raises:
        RecipeError: names the field.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for argument in fields.trainer:
        if argument not in known:
            raise RecipeError(
                f"{name}: trainer has {argument!r}, which TrainingArguments does not know."
                + did_you_mean([argument], known)
            )
        if argument in _OURS:
            own = _OURS[argument]
            what = "A step is kept whole or not at all" if own is None else f"Set the recipe's own `{own}`"
            raise RecipeError(f"{name}: trainer sets {argument!r}. {what}; remove it here.")


def training_arguments(fields: Training, scratch: Path | str, *, precision: str, seed: int) -> TrainingArguments:
    """Cosine decay after a short warm-up, one line in the log every fifth of the way, and what the recipe adds.

    Raises:
        RecipeError: a value that `TrainingArguments` refuses.
    """
    usual: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, fields.steps // 10),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": max(1, fields.steps // 5),
        "report_to": [],
    }
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # new and old name in transformers
        if fields.trainer.get(name):  # reentrant, it would lose the languages of tokens
            usual[f"{name}_kwargs"] = {"use_reentrant": False}
    try:
        return TrainingArguments(
            output_dir=str(scratch),
            max_steps=fields.steps,
            per_device_train_batch_size=fields.batch_size,
            learning_rate=fields.learning_rate,
            bf16=precision == "bf16",
            save_strategy="no",
            seed=seed,
            **{**usual, **fields.trainer},
        )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"trainer: {dict(fields.trainer)} is refused by TrainingArguments: {error}") from error
