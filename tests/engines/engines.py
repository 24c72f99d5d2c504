"""Engines that train one model on several processes, each behind the same few methods.

In: an upcycled model. Out: an `Engine`, whose losses, gradients and parameters can be compared with one process's.
accelerate refuses FSDP on a CPU. So FSDP2 is driven one level lower: as PyTorch's own `fully_shard`, and as the two
functions of accelerate that prepare a model with it.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import init_empty_weights
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

try:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
except ImportError:
    deepspeed = None
else:
    # On a CPU it would compile a kernel for shared memory. (The package's attribute `torch` is PyTorch.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
WRAPPED_IN = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")
RATE = 0.1
"""Plain SGD: its steps are as close to one another as the gradients are."""


def plain(name: str) -> str:
    """A parameter's name without what wrappers put in."""
    for part in WRAPPED_IN:
        name = name.replace(part, "")
    return name


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


class Refusal(Exception):
    """What an engine says by itself of a model that it does not take."""


class Engine:
    """One process, which sees the batches of all; what the others are held to."""

    name = "one process"
    takes_only_loaded = False
    """Whether every case begins with files, as nothing else would be sharded."""

    @classmethod
    def launch(cls) -> None:
        """Set the environment, as whoever starts the processes does, before there is a model."""
        os.environ.pop("ACCELERATE_USE_FSDP", None)

    @classmethod
    def loaded(cls, folder: Path) -> Any:
        """A base model from files, with as little of it on each process as the engine knows how to."""
        return AutoModelForCausalLM.from_pretrained(folder)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.run: nn.Module = self.wrap(model)
        self.optimizer = self.make_optimizer()

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def make_optimizer(self) -> Any:
        return sgd(self.model)

    def again(self) -> Engine:
        """Another engine on the same model, as a second Trainer is."""
        return type(self)(self.model)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """`last` of the passes of a step."""
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """What trains: its gradients, whole, zeros where there is none."""
        return {
            plain(name): torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def parameters(self) -> dict[str, Tensor]:
        """Everything, whole."""
        return {plain(name): p.detach().clone() for name, p in self.model.named_parameters()}

    def save(self, folder: Path) -> None:
        """The engine's own checkpoint."""
        torch.save(self.model.state_dict(), folder / "model.pt")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))

    def close(self) -> None:
        """Let go of what outlives the engine."""


class DDP(Engine):
    """`DistributedDataParallel`."""

    name = "DDP"

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)

    def save(self, folder: Path) -> None:
        if distributed.get_rank() == 0:
            super().save(folder)
        distributed.barrier()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        (loss * distributed.get_world_size()).backward()


class Sharded(DDP):
    """Parameters are spread over processes, and so is the checkpoint."""

    def save(self, folder: Path) -> None:
        dcp.save(get_model_state_dict(self.run), checkpoint_id=folder / "dcp")

    def load(self, folder: Path) -> None:
        state = get_model_state_dict(self.run)
        dcp.load(state, checkpoint_id=folder / "dcp")
        set_model_state_dict(self.run, state)


class FSDP2(Sharded):
    """`fully_shard` of each decoder layer and of the model."""

    name = "FSDP2"

    @classmethod
    def loaded(cls, folder: Path) -> Any:
        """Sharded without content; one process reads it and hands out the shards."""
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        cls.shard(model)
        tensors = super().loaded(folder).state_dict() if distributed.get_rank() == 0 else {}
        set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.shard(model)

    @staticmethod
    def shard(model: nn.Module) -> nn.Module:
        """Unless it is."""
        if not any(isinstance(module, torch.distributed.fsdp.FSDPModule) for module in model.modules()):
            mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
            for module in reversed(list(model.modules())):
                if isinstance(module, LlamaDecoderLayer):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(gradient) for name, gradient in super().gradients().items()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: whole(parameter) for name, parameter in super().parameters().items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that was spread over processes, on each of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class TransformersFSDP2(FSDP2):
    """`from_pretrained(distributed_config=...)`: each process reads its own shards, and what is added follows them."""

    name, takes_only_loaded = "FSDP2 by transformers", True

    @classmethod
    def loaded(cls, folder: Path) -> Any:
        size = DistributedConfig(fsdp_size=distributed.get_world_size())
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=size)


class AccelerateFSDP2(FSDP2):
    """What accelerate does to a model under `examples/fsdp2.yaml`: it checkpoints, and loads on one process."""

    name = "FSDP2 by accelerate"

    @classmethod
    def loaded(cls, folder: Path) -> Any:
        return Engine.loaded(folder)

    @classmethod
    def launch(cls) -> None:
        asked = yaml.safe_load((EXAMPLES / "fsdp2.yaml").read_text())["fsdp_config"]
        os.environ |= {name.upper(): str(value) for name, value in asked.items()} | {"ACCELERATE_USE_FSDP": "true"}

    def wrap(self, model: nn.Module) -> nn.Module:
        plugin = FullyShardedDataParallelPlugin()
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("dp_shard",))
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=mesh, mixed_precision="no",
            parallelism_config=SimpleNamespace(fsdp_dim_names=("dp_shard",)), device=torch.device("cpu"),
            is_main_process=distributed.get_rank() == 0,
        )  # fmt: skip
        plugin.set_auto_wrap_policy(model)
        return fsdp2_prepare_model(accelerator, fsdp2_apply_ac(accelerator, model))


class FSDP1(Sharded):
    """`FullyShardedDataParallel(use_orig_params=True)`."""

    name = "FSDP1"
    options: ClassVar[dict[str, Any]] = {"use_orig_params": True}

    def wrap(self, model: nn.Module) -> nn.Module:
        settings = {"auto_wrap_policy": ModuleWrapPolicy({LlamaDecoderLayer}), "device_id": torch.device("cpu")}
        try:
            return FullyShardedDataParallel(model, **settings, **self.options)
        except ValueError as error:
            why = next(part for part in str(error).split(". ") if "use_orig_params" in part)
            raise Refusal(f"PyTorch: {why}.") from error

    def gradients(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.run, with_grads=True):
            return super().gradients()

    def parameters(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.run):
            return super().parameters()


class FSDP1Flat(FSDP1):
    """`FullyShardedDataParallel`, as it comes."""

    name = "FSDP1, use_orig_params=False"
    options: ClassVar[dict[str, Any]] = {}


class DeepSpeed(Engine):
    """`deepspeed.initialize` with the stage of `examples/zero3.json` changed."""

    stage = 3

    @classmethod
    def settings(cls) -> dict[str, Any]:
        settings = json.loads((EXAMPLES / "zero3.json").read_text())
        settings["zero_optimization"]["stage"] = cls.stage
        del settings["train_batch_size"]
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        return settings | {"bf16": {"enabled": False}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}

    @classmethod
    def loaded(cls, folder: Path) -> Any:
        """While this object lives, transformers gives stage 3 each parameter as soon as there is one."""
        kept = HfDeepSpeedConfig(cls.settings())
        model = super().loaded(folder)
        model.__dict__["kept"] = kept
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=self.settings())
        return engine

    def make_optimizer(self) -> Any:
        return self.optimizer

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.run.set_gradient_accumulation_boundary(last)
        self.run.backward(loss * distributed.get_world_size())

    def step(self) -> None:
        self.run.step()

    def gradients(self) -> dict[str, Tensor]:
        found = {plain(name): safe_get_full_grad(p) for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: gradient.detach().clone() for name, gradient in found.items()}

    def parameters(self) -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return super().parameters()

    def save(self, folder: Path) -> None:
        self.run.save_checkpoint(str(folder / "deepspeed"))

    def load(self, folder: Path) -> None:
        self.run.load_checkpoint(str(folder / "deepspeed"))

    def again(self) -> Engine:
        self.close()
        return super().again()

    def close(self) -> None:
        self.run.destroy()
        unset_hf_deepspeed_config()


class Zero1(DeepSpeed):
    """Optimizer states are spread."""

    name, stage = "ZeRO-1", 1


class Zero2(DeepSpeed):
    """Gradients, too."""

    name, stage = "ZeRO-2", 2


class Zero3(DeepSpeed):
    """Parameters, too."""

    name, stage = "ZeRO-3", 3


ALL = (DDP, FSDP2, AccelerateFSDP2, TransformersFSDP2, FSDP1, FSDP1Flat, Zero1, Zero2, Zero3)
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in ALL}


@contextmanager
def opened(engine: Engine) -> Iterator[Engine]:
    """An engine for the length of a block."""
    try:
        yield engine
    finally:
        engine.close()
