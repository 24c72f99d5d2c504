"""What the training tests share: a tokenizer whose text is its tokens, documents in four languages, short runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from builders import VOCABULARY, pico, upcycle
from chance import shifted
from peft_moe_delta import LanguageCollator
from peft_moe_delta.tuner.context import ForwardContext


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Words w3 to w98 are tokens 3 to 98; padding is end-of-text unless `pad_token` says otherwise."""
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(len(special), VOCABULARY))])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", **options}
    )


def base_model(family: str = "llama", **config: Any) -> PreTrainedModel:
    """A pico model: the same weights at every call."""
    torch.manual_seed(shifted(0))
    return pico(family, **config)


def expert_model(family: str = "llama", *, base: dict[str, Any] | None = None, **changes: Any) -> PeftModel:
    """A pico model with experts of their own, in training mode: the same weights at every call."""
    return upcycle(base_model(family, **(base or {})), **{"trained": True, **changes}).train()


def checkpoint(model: nn.Module, **arguments: Any) -> None:
    """Switch gradient checkpointing on; transformers before 5.23 knows it by its older name only."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(arguments)


def documents(lengths: Sequence[int], languages: Sequence[str], seed: int = 3) -> list[dict[str, Any]]:
    """Seeded documents, one a length; `languages` repeat as often as needed."""
    generator = torch.Generator().manual_seed(shifted(seed))
    return [
        {
            "input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(),
            "language": languages[i % len(languages)],
        }
        for i, length in enumerate(lengths)
    ]


def train(
    model: nn.Module,
    data: Any,
    folder: Path,
    *,
    trainer_class: type[Trainer] = Trainer,
    callbacks: Sequence[TrainerCallback] = (),
    compute_loss_func: Callable | None = None,
    collator: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer with a `LanguageCollator`, run; `resume_from_checkpoint` goes to `train`. Returns the trainer."""
    resume = arguments.pop("resume_from_checkpoint", None)
    defaults = {"max_steps": 1, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4}
    trainer = trainer_class(
        model,
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=data,
        data_collator=LanguageCollator(make_tokenizer(), model, **(collator or {})),
        callbacks=list(callbacks),
        compute_loss_func=compute_loss_func,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a model's trainable parameters; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Same names, same tensors; without tolerance bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def context_of(model: nn.Module) -> ForwardContext:
    return ForwardContext.of(model.get_base_model())
