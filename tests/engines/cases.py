"""What is done under every engine: three steps and what belongs around them, for each routing.

In: an engine, a routing and a stage. Out: tensors by name, which have to be those of one process that sees the
documents of all at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from builders import perturbed, pico, randomise_experts, upcycle
from chance import shifted
from engines.engines import Engine, opened, whole
from peft_moe_delta import LanguageCollator, fit_identifier, fit_routers
from peft_moe_delta.graft.files import graft_checkpoint
from reading import MEMORY, text_of, texts
from training.common import checkpoint, make_tokenizer

WORLD = 2
STEPS = (("en", "hu"), ("hu", "az"), ("en fi", "az hu"))
"""The languages of each process, step by step."""
LENGTHS = (14, 9)
ROUTINGS: dict[str, dict[str, Any]] = {
    "learned": {"routing": "learned", "router_z_loss_coef": 0.1},
    "language": {"routing": "language", "router_z_loss_coef": 0.1, "language_prior_coef": 0.5},
    "context": {"routing": "context"},
    "classifier": {"routing": "classifier", "classifier_layers": [0, 1], "classifier_coef": 1.0},
    "attention, low rank": {"routing": "language", "attention_experts": "shared_kv", "expert_rank": 4},
}
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One cell of the table, in one of the processes, or in the one that stands for all (`rank` is None)."""

    engine: type[Engine]
    routing: str
    rank: int | None
    folder: Path

    def model(self, **changes: Any) -> PeftModel:
        """A pico Llama with experts, the same everywhere."""
        settings = {"load_balancing_coef": 0.5, **ROUTINGS[self.routing], **changes}
        base = self.engine.loaded(self.base_folder()) if self.engine.takes_only_loaded else self.base()
        model = upcycle(base, **settings)
        model = randomise_experts(model) if "low rank" not in self.routing else model
        if self.routing == "context":
            fit_identifier(model, texts(documents=8), make_tokenizer(), memory=MEMORY)
        return model.train()

    @staticmethod
    def base() -> Any:
        """Its base."""
        return pico(use_cache=False)  # as Trainer has it

    def base_folder(self) -> Path:
        """Where its files are."""
        folder = self.folder / "base"
        if not self.rank and not folder.exists():
            self.base().save_pretrained(folder)
        if self.rank is not None:
            distributed.barrier()
        return folder

    def documents(self, step: int, micro: int, rank: int) -> list[dict[str, Any]]:
        """Two documents of each process; the first half of the first process's is no target."""
        generator = torch.Generator().manual_seed(shifted(100 * step + 10 * micro + rank))
        found = []
        for index, length in enumerate(LENGTHS):
            codes = STEPS[step][rank].split()
            code = codes[index % len(codes)]
            ids = text_of(code, length, generator).tolist()
            masked = 0 if rank else length // 2
            found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "language": code})
        return found

    def batch(self, model: PeftModel, step: int, micro: int = 0, rank: int | None = None) -> dict[str, Tensor]:
        """A process's batch, or the joint one."""
        ranks = range(WORLD) if rank is None else [rank]
        joint = [document for each in ranks for document in self.documents(step, micro, each)]
        batch = LanguageCollator(make_tokenizer(), model.peft_config["default"])(joint)
        if self.routing == "context":
            del batch["language_ids"]
        return batch

    def train(self, engine: Engine, model: PeftModel, steps: range, micros: int = 1) -> Found:
        """Steps of SGD: their losses, the first one's gradients, the parameters after the last."""
        found: Found = {}
        for step in steps:
            batches = [self.batch(model, step, micro, self.rank) for micro in range(micros)]
            joint = [self.batch(model, step, micro) for micro in range(micros)]
            items = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in joint)
            for micro, batch in enumerate(batches):
                loss = engine.run(**batch, num_items_in_batch=items).loss
                engine.backward(loss, last=micro == micros - 1)
                found[f"loss/{step}/{micro}"] = self.everywhere(loss.detach())
            if step == steps[0]:
                found |= {f"gradient/{name}": gradient for name, gradient in engine.gradients().items()}
            engine.step()
        return found | {f"parameter/{name}": p for name, p in engine.parameters().items()}

    def everywhere(self, loss: Tensor) -> Tensor:
        """The sum over processes."""
        if self.rank is not None:
            distributed.all_reduce(loss)
        return loss

    def save(self, model: PeftModel, name: str) -> Path:
        """`save_pretrained`, as every process calls it."""
        folder = self.folder / name
        model.save_pretrained(folder, is_main_process=not self.rank)
        if self.rank is not None:
            distributed.barrier()
        return folder


def expansion(case: Case) -> Found:
    model = case.model()
    with opened(case.engine(model)) as engine:
        return case.train(engine, model, range(3))


def review(case: Case) -> Found:
    model = case.model(stage="review", language_prior_coef=5.0)
    with opened(case.engine(model)) as engine:
        return case.train(engine, model, range(3))


def accumulation(case: Case) -> Found:
    model = case.model()
    with opened(case.engine(model)) as engine:
        return case.train(engine, model, range(2), micros=2)


def evaluation(case: Case) -> Found:
    """Between two steps."""
    model = case.model()
    found: Found = {}
    with opened(case.engine(model)) as engine:
        case.train(engine, model, range(1))
        model.eval()
        with torch.no_grad():
            for step in range(3):
                for rank in range(WORLD) if case.rank is None else [case.rank]:
                    batch = case.batch(model, step, rank=rank)
                    found[f"logits/{step}/{rank}"] = engine.run(**batch).logits
        model.train()
        return found | case.train(engine, model, range(1, 2))


def transformers_checkpointing(case: Case) -> Found:
    model = case.model()
    if case.rank is not None:
        checkpoint(model, use_reentrant=False)
    with opened(case.engine(model)) as engine:
        return case.train(engine, model, range(3))


def wrapper_checkpointing(case: Case) -> Found:
    """As accelerate's `fsdp_activation_checkpointing` does it."""
    model = case.model()
    if case.rank is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, LlamaDecoderLayer):
                model.set_submodule(name, checkpoint_wrapper(module, preserve_rng_state=False))
    with opened(case.engine(model)) as engine:
        return case.train(engine, model, range(3))


def save_pretrained(case: Case) -> Found:
    model = case.model()
    with opened(case.engine(model)) as engine:
        case.train(engine, model, range(1))
        return load_file(case.save(model, "adapter") / "adapter_model.safetensors")


def resume(case: Case) -> Found:
    """From the engine's own checkpoint."""
    model = case.model()
    with opened(case.engine(model)) as engine:
        case.train(engine, model, range(1))
        engine.save(case.folder)
    model = case.model()
    with opened(case.engine(model)) as engine:
        engine.load(case.folder)
        return case.train(engine, model, range(1, 3))


def loading(case: Case) -> Found:
    """The base from files, by this engine's way to have no copy of it on each process; a trained adapter on it."""
    adapter = case.save(case.model(), "trained")
    base = case.engine.loaded(case.base_folder())
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    if sharded := [p for p in base.parameters() if isinstance(p, DTensor)]:
        assert len(sharded) == len(list(model.parameters()))
        assert sum(p.to_local().numel() for p in sharded) < 0.51 * sum(p.numel() for p in sharded)
    with opened(case.engine(model)) as engine:
        found = case.train(engine, model, range(3))
        return found | load_file(case.save(model, "adapter") / "adapter_model.safetensors")


def two_stages(case: Case) -> Found:
    """Expansion, `start_review` on the model that the engine holds, another engine on it, and the adapter's file."""
    model = case.model()
    engine = case.engine(model)
    case.train(engine, model, range(1))
    model.start_review(language_prior_coef=5.0)
    with opened(engine.again()) as engine:
        found = case.train(engine, model, range(1, 3))
        return found | load_file(case.save(model, "reviewed") / "adapter_model.safetensors")


def graft_from_files(case: Case) -> Found:
    """What a sharded model saved, grafted; all of it whole."""
    model = case.model()
    with opened(case.engine(model)) as engine:
        case.train(engine, model, range(1))
        adapter = case.save(model, "trained")
    base, output = case.base_folder(), case.folder / "grafted"
    if not case.rank:
        perturbed(case.base()).save_pretrained(case.folder / "post")
        graft_checkpoint(base, case.folder / "post", adapter, output, target="adapter")
    if case.rank is not None:
        distributed.barrier()
    return load_file(output / "adapter_model.safetensors")


def trained_then(act: Callable[[PeftModel], Any]) -> Callable[[Case], Found]:
    """Something that changes the model after a step; then one more pass."""

    def stage(case: Case) -> Found:
        model = case.model()
        with opened(case.engine(model)) as engine:
            case.train(engine, model, range(1))
            changed = act(model)
            return {name: whole(p.detach()) for name, p in (changed or model).named_parameters()}

    return stage


def _graft(model: PeftModel) -> nn.Module:
    return model.base_model.graft(copy.deepcopy(perturbed(Case.base())))


STAGES: dict[str, Callable[[Case], Found]] = {
    "expansion": expansion,
    "review": review,
    "evaluation": evaluation,
    "accumulation": accumulation,
    "checkpointing, transformers'": transformers_checkpointing,
    "checkpointing, wrapped layers": wrapper_checkpointing,
    "save_pretrained": save_pretrained,
    "resume": resume,
    "loading": loading,
    "two stages": two_stages,
    "graft from files": graft_from_files,
    "fit_routers": trained_then(lambda model: fit_routers(model, texts(documents=2), make_tokenizer()) and None),
    "add_languages": trained_then(lambda model: model.add_languages({"el": "hellenic"}, {"hellenic": 1})),
    "graft in memory": trained_then(_graft),
}


def reference(folder: Path, routing: str, stage: str) -> Path:
    """Where it is kept what one process found."""
    return folder / f"{routing}.{stage}.pt"
