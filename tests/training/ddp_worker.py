"""One of several data-parallel processes: `python ddp_worker.py RANK WORLD FOLDER`; also says what they all run.

Each case takes three steps on the process's own documents. The process leaves gradients of the first step and the
parameters of the last in `FOLDER/RANK.pt`, and the gradients of a step under each trainer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, distributed, nn
from transformers import Trainer

from peft_moe_delta import AuxiliaryLossMixin, LanguageCollator, RoutingCallback, TrainingMonitor
from peft_moe_delta.errors import DataError
from training.common import (
    GradientRecorder,
    checkpoint,
    documents,
    expert_model,
    gradients,
    make_tokenizer,
    parameters,
    train,
)

STEPS = 3
LENGTHS = (6, 3, 5, 7)
CASES: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "learned": ({"load_balancing_coef": 0.0}, ("en hu", "az fi")),
    "learned, an expert without tokens": ({"load_balancing_coef": 0.0, "top_k": 1, "trained": False}, ("en", "hu")),
    "by language": ({"load_balancing_coef": 0.0, "routing": "language"}, ("en hu", "az fi")),
    "by language, English alone": ({"load_balancing_coef": 0.0, "routing": "language"}, ("en", "hu")),
    "by language, one expert a group": (
        {"routing": "language", "experts": {"uralic": 1, "turkic": 1}, "top_k": 1},
        ("az", "hu"),
    ),
    "low rank, by language": ({"load_balancing_coef": 0.0, "routing": "language", "expert_rank": 4}, ("en", "az")),
    "review": ({"stage": "review", "language_prior_coef": 5.0}, ("en hu", "en az")),
    "review, one side without originals": ({"stage": "review", "language_prior_coef": 5.0}, ("en", "hu")),
    "review, by language": ({"stage": "review", "language_prior_coef": 5.0, "routing": "language"}, ("en", "hu")),
    "prior in expansion": (
        {"load_balancing_coef": 0.0, "routing": "language", "language_prior_coef": 1.28},
        ("en", "hu"),
    ),
    "load balancing": ({"routing": "language"}, ("en", "hu")),
    "gradient checkpointing": ({"load_balancing_coef": 0.0, "checkpointing": True}, ("en hu", "az fi")),
}
"""Name -> (changes of the model, languages of each process)."""


def make_model(changes: dict[str, Any]) -> nn.Module:
    changes = dict(changes)
    checkpointing = changes.pop("checkpointing", False)
    model = expert_model(**changes)
    if checkpointing:
        checkpoint(model, use_reentrant=False)
    return model


def documents_of(languages: tuple[str, str], step: int) -> list[list[dict[str, Any]]]:
    """The documents of each process in one step."""
    halves = zip((LENGTHS[:2], LENGTHS[2:]), languages, strict=True)
    return [documents(n, codes.split(), seed=10 * step + i) for i, (n, codes) in enumerate(halves)]


def batches(languages: tuple[str, str], step: int, model: nn.Module) -> list[dict[str, Tensor]]:
    """The batch of each process in one step."""
    return [LanguageCollator(make_tokenizer(), model)(found) for found in documents_of(languages, step)]


def joint_batch(languages: tuple[str, str], step: int, model: nn.Module) -> dict[str, Tensor]:
    """The same documents as one batch."""
    every = [document for found in documents_of(languages, step) for document in found]
    return LanguageCollator(make_tokenizer(), model)(every)


def targets(batch: dict[str, Tensor]) -> int:
    return int(batch["labels"][:, 1:].ne(-100).sum())


def run(model: nn.Module, losses: Callable[[int], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three AdamW steps on `losses(step)`: gradients of the first, parameters after the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    first = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses(step).backward()
        first = first or gradients(model)
        optimizer.step()
    return first, parameters(model)


def work(rank: int, world: int, changes: dict[str, Any], languages: tuple[str, str]) -> tuple[dict, dict]:
    model = make_model(changes)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)

    def loss(step: int) -> Tensor:
        each = batches(languages, step, model)
        # As Trainer: over the targets of all processes, times the processes DDP is going to divide by.
        return parallel(**each[rank], num_items_in_batch=sum(map(targets, each))).loss * world

    return run(model, loss)


class MixedTrainer(AuxiliaryLossMixin, Trainer):
    """Adds the auxiliary loss itself."""


TRAINERS = {"Trainer": Trainer, "Trainer with the mixin": MixedTrainer, "streamed and packed": Trainer}


def with_trainer(
    name: str, folder: Path, size: int, dispatch: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One step of a Trainer on four documents, of which a process sees `size` at a time: gradients, and the log."""
    recorder = GradientRecorder()
    model = expert_model(routing="language", stage="review", language_prior_coef=5.0)
    data: Any = documents((5, 5, 5, 5), ["en", "hu", "en", "az"])  # as many targets to a token in every pass
    arguments: dict[str, Any] = {"per_device_train_batch_size": size, "max_grad_norm": 0.0}
    arguments["ddp_find_unused_parameters"] = False
    if name == "streamed and packed":
        data = Dataset.from_list(data).to_iterable_dataset()
        arguments |= {"collator": {"packing": True, "max_length": 10}}
        arguments |= {"accelerator_config": {"dispatch_batches": dispatch}}
    callbacks = [recorder, RoutingCallback(), TrainingMonitor()]
    trainer = train(model, data, folder, trainer_class=TRAINERS[name], callbacks=callbacks, **arguments)
    return recorder.steps[0], trainer.state.log_history[0]


def refusal(folder: Path) -> str:
    """What is said where one process would cut up the batches of all."""
    try:
        with_trainer("streamed and packed", folder, size=2, dispatch=True)
    except DataError as error:
        return str(error)
    return "nothing"


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found: dict[str, Any] = dict.fromkeys(CASES, "not run: an earlier case left the processes apart")
    for name, (changes, languages) in CASES.items():
        try:
            found[name] = work(rank, world, changes, languages)
        except RuntimeError as error:  # DDP's word for gradients that are missing or late
            found[name] = str(error)
            break
    else:
        found |= {name: with_trainer(name, folder, size=2) for name in TRAINERS}
        found["refusal"] = refusal(folder)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
