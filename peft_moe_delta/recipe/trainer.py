"""Hugging Face's `Trainer` as a step uses it: its arguments, those that a recipe sets and whatever else its `trainer`
sections say, and what lets it stop at Ctrl-C or SIGTERM and end where it would have ended without.

In: a training's fields. Out: `TrainingArguments`, or an error that names the field; a `Trainer`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import RecipeError
from ..kinds import did_you_mean
from ..monitor import TrainingMonitor, resumed_state
from .fields import Training
from .interruption import Interruption

_OURS = {
    "output_dir": "output", "max_steps": "steps", "num_train_epochs": "steps", "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size", "seed": "seed", "bf16": "precision", "fp16": "precision",
    "save_strategy": None, "save_only_model": None, "restore_callback_states_from_checkpoint": None,
    "eval_strategy": None, "remove_unused_columns": None,
}  # fmt: skip
"""Arguments that a recipe decides, and its own field for each; None where a step could not be kept whole otherwise."""

_SAVING = ("save_steps", "save_total_limit")


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
            what = "A step decides that itself" if own is None else f"Set the recipe's own `{own}`"
            raise RecipeError(f"{name}: trainer sets {argument!r}. {what}; remove it here.")


def what_counts(fields: Training) -> dict[str, Any]:
    """What the result of a training depends on: all fields, but not how often it is saved on the way."""
    kept = {name: value for name, value in fields.trainer.items() if name not in _SAVING}
    return {**dataclasses.asdict(fields), "trainer": kept}


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
        "save_total_limit": 1,
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
            save_strategy="steps" if "save_steps" in fields.trainer else "no",
            seed=seed,
            **{**usual, **fields.trainer},
        )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"trainer: {dict(fields.trainer)} is refused by TrainingArguments: {error}") from error


class StepTrainer(Trainer):
    """The plain Trainer, whose log tells the same loss where a training was interrupted.

    Trainer begins to add losses up anew at a checkpoint, so that the next line of its log would leave out what was
    before it. Here the sum goes on; without an interruption it is the very same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses = _Losses()
        self.add_callback(self._losses)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.add(loss, self.state.global_step)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["loss"] = self._losses.read(self.state.global_step)
        elif "train_loss" in logs:
            logs["train_loss"] = self._losses.mean(self.state.global_step)
        super().log(logs, start_time)


class _Losses(TrainerCallback, ExportableState):
    """Losses since the last line of the log, as one number on their device, and before it."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._logged, self._logged_at = 0.0, 0

    def state(self) -> dict[str, Any]:
        since = 0.0 if self._sum is None else self._sum.item()
        return {"args": {}, "attributes": {"since": since, "logged": self._logged, "logged_at": self._logged_at}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = resumed_state(self, state)
        self._sum = torch.tensor(saved.get("since", 0.0), device=args.device)
        self._logged, self._logged_at = saved.get("logged", 0.0), saved.get("logged_at", state.global_step)

    def add(self, loss: Tensor, step: int) -> None:
        """One pass's share of a step's loss; one that is not finite counts as the mean so far, as in Trainer."""
        assert self._sum is not None
        self._sum = self._sum + torch.where(loss.isfinite(), loss, self._sum / (1 + step - self._logged_at))

    def read(self, step: int) -> float:
        """The mean loss of the steps since this was last asked."""
        assert self._sum is not None
        steps, since, self._sum = step - self._logged_at, self._sum.item(), torch.zeros_like(self._sum)
        self._logged, self._logged_at = self._logged + since, step
        return since / steps

    def mean(self, step: int) -> float:
        """The mean loss of all steps."""
        return (self._logged + (0.0 if self._sum is None else self._sum.item())) / max(step, 1)


class StepMonitor(TrainingMonitor):
    """The monitor, which also stops a training at Ctrl-C or SIGTERM: after the step under way, with a checkpoint.

    Attributes:
        stopped: whether it has.
    """

    def __init__(self, interruption: Interruption) -> None:
        super().__init__()
        self._interruption, self.stopped = interruption, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps:
            control.should_save = False  # the result itself is saved next
        elif self._interruption.asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.stopped:  # it is no end, so nothing of the end is doubted
            super().on_train_end(args, state, control, **kwargs)
