"""Measuring while training: bits per byte and routing shares of each language, to whatever `report_to` is.

In: a Trainer and held-out texts. Out: figures in its log: `log_history`, the console, TensorBoard and all other
reporters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..documents import check_documents, check_languages
from ..errors import DataError
from ..tuner import MoeDeltaConfig
from .bits_per_byte import bits_per_byte
from .routes import routing_by_language


class LanguageEvaluationCallback(TrainerCallback):
    """Logs, every so many steps and at the end, what the model makes of held-out text of each language.

    `bits_per_byte/<language>`, and for a model with routers `routing_share/<language>/<expert>`: the share of choices
    that went to an expert, mean over layers. It hands them to `trainer.log`, so that every reporter gets them wherever
    it stands among the callbacks:

        trainer.add_callback(LanguageEvaluationCallback(trainer, tokenizer, {"hu": texts}, every=50))

    Args:
        trainer: whose log it is.
        tokenizer: of the model.
        texts: language -> held-out documents. Every language an adapter is asked about must be one of its own.
        every: steps between measurements.
        max_length, batch_size: as in `bits_per_byte`.

    Raises:
        DataError: no texts, or `every` below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, Sequence[str]],
        *,
        every: int = 100,
        max_length: int = 512,
        batch_size: int = 8,
    ) -> None:
        check_languages(texts)
        if not texts or every < 1:
            raise DataError(
                f"LanguageEvaluationCallback: got texts of {len(texts)} languages and every={every}, expected at least "
                "one language and at least one step. Pass {language: [text, ...]}."
            )
        self.trainer, self.tokenizer, self.every = trainer, tokenizer, every
        self.texts = {code: check_documents(listed, f"texts[{code!r}]") for code, listed in texts.items()}
        self.options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        due = control.should_log
        self.trainer.log(self.measure())  # measured by every process: a sharded model needs all of them
        control.should_log = due  # logging marks the training loss as logged, which it is not

    def measure(self) -> dict[str, float]:
        """The figures of the model as it is now. Random states and the model's mode are as before afterwards."""
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        config = getattr(model, "active_peft_config", None)
        adapted = isinstance(config, MoeDeltaConfig)
        figures = {}
        for language, texts in self.texts.items():
            spoken = language if adapted else None
            score = bits_per_byte(model, self.tokenizer, texts, language=spoken, **self.options)
            figures[f"bits_per_byte/{language}"] = score.value
            routing = routing_by_language(model, self.tokenizer, texts, name="", language=language, spoken=spoken)
            if routing is not None:
                shares = np.mean(routing.shares, axis=0)
                figures |= {
                    f"routing_share/{language}/{expert}": float(share)
                    for expert, share in zip(routing.experts, shares, strict=True)
                }
        return figures
