"""Other processes that train the same model, and what they make of its parameters.

In: a model that DDP, FSDP or DeepSpeed may hold. Out: sums over processes; whole tensors, gathered from all; or a
refusal that says what to do instead.

DeepSpeed is never imported: its ZeRO-3 puts what it knows onto the parameters themselves (`ds_id`, `all_gather`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn

from ..errors import ArchitectureError, CheckpointError, PeftMoeDeltaError

if distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, fully_shard

WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What PyTorch's wrappers put into the names of modules, and take out of the names in a state dict."""


def parallel() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized()


def summed_over_processes(numbers: Tensor) -> Tensor:
    """The sums over all processes of numbers without gradient, in place; every process has to ask."""
    distributed.all_reduce(numbers)
    return numbers


def plain_name(name: str) -> str:
    """A name without what wrappers put in."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def loads_on_one() -> bool:
    """Whether the first process loads the model for all: FSDP's `cpu_ram_efficient_loading`, as transformers asks."""
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return parallel() and all(map(parse_flag_from_env, flags))


def is_stand_in() -> bool:
    """Whether this process's base model is empty, as another one loads for all."""
    return loads_on_one() and os.environ.get("LOCAL_RANK", "-1") != "0"


def check_hands_out_buffers() -> None:
    """Refuse a buffer where accelerate would hand out parameters alone, and stumble.

    Raises:
        PeftMoeDeltaError: it would.
    """
    if loads_on_one():
        raise PeftMoeDeltaError(
            "With fsdp_cpu_ram_efficient_loading accelerate hands out parameters alone, and what an identifier knows "
            "is a buffer. Set it to false in accelerate's config, or train with language_ids alone and call "
            "fit_identifier(...) in one process afterwards."
        )


def sharding_of(model: nn.Module) -> str | None:
    """What has spread the model's parameters over processes, by name; None where each process has them whole."""
    if any("_fsdp_wrapped_module" in name for name, _ in model.named_modules()):
        return "FSDP1"
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed's ZeRO-3"
        if is_sharded(parameter):
            return "FSDP2"
    return None


def check_can_follow(model: nn.Module, *, grows: bool) -> None:
    """Refuse a base model that is sharded in a way in which an adapter cannot be (`shard_with`).

    Args:
        model: the base model.
        grows: whether the adapter adds tokens to the vocabulary.

    Raises:
        ArchitectureError: it is.
    """
    if parallel():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost one keeps its parameters whole after a forward pass
    if (why := _why_not_followed(model, grows)) is not None:
        raise ArchitectureError(
            f"The base model is sharded already, {why}, so what this adapter adds would not be. Load it with "
            "DistributedConfig(fsdp_size=...) alone, for one adapter without new tokens; or load it whole "
            "(accelerate's fsdp_cpu_ram_efficient_loading: on one process alone), upcycle it, and let the engine shard "
            "the result."
        )


def _why_not_followed(model: nn.Module, grows: bool) -> str | None:
    """Why what is put into a model cannot be sharded with it; None where it can, or where the engine does so later."""
    if (engine := sharding_of(model)) == "FSDP1":
        return "by FSDP1"
    if engine != "FSDP2":
        return None
    if any("moe_delta_" in name for name, _ in model.named_parameters()):
        return "with an adapter"
    if grows:
        return "its embeddings, too, which new tokens need whole"
    return None if all(map(_in_rows, model.parameters())) else "not by FSDP2 alone, or it is offloaded or not loaded"


def _in_rows(parameter: Any) -> bool:
    """Whether FSDP2, and nothing else, has spread a parameter, and its shards are where they are computed with."""
    if not hasattr(parameter, "device_mesh") or parameter.device.type != parameter.device_mesh.device_type:
        return False
    *replicated, last = parameter.placements
    return bool(last.is_shard(0)) and all(placement.is_replicate() for placement in replicated)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which this process has a shard."""
    return hasattr(parameter, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A DTensor whole, on every process, all of which have to ask; any other tensor as it is."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def shard_with(base: nn.Module, layer: nn.Module) -> None:
    """Spread a layer's parameters, but for those of its base module, over processes as FSDP2 has spread the latter's.

    The layer becomes a unit of its own of FSDP2, as parameters cannot join the unit of the decoder layer around it.
    """
    own: Any = next(base.parameters())
    layer.register_forward_hook(_no_view)
    fully_shard(layer, mesh=own.device_mesh, reshard_after_forward=True, ignored_params=set(base.parameters()))


def _no_view(layer: nn.Module, args: Any, output: Any) -> Any:
    """FSDP2 gathers a unit for its backward pass by a hook on its output, which would not survive `+=` on a view."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def prepare_for_engine(model: Any) -> None:
    """What an engine that holds a model needs, before its next training pass.

    ZeRO-3 hands the gradients of a whole layer of experts on as soon as its input has one; an input without one counts
    at once. That of the first layer has none where everything before it is frozen, and inputs by keyword, as attention
    is called, are not looked at.

    Raises:
        PeftMoeDeltaError: as `check_trains`.
    """
    if not parallel():
        return
    check_trains(model)
    if not hasattr(next(model.parameters()), "ds_id"):
        return
    if not hasattr(model, "_require_grads_hook"):
        model.enable_input_require_grads()
    for layer in model.modules():
        if getattr(layer, "_z3_leaf", False) and _in_its_place not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_in_its_place, prepend=True, with_kwargs=True)


def _in_its_place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's input by position."""
    return (args, kwargs) if args else ((kwargs.pop("hidden_states"),), kwargs)


def check_trains(model: nn.Module) -> None:
    """Refuse an engine under which a training is wrong and does not say so, before its first step.

    FSDP1 keeps the gradients of a whole decoder layer in one flat tensor, and with `use_orig_params=True` parameters
    came out of a step as numbers that nobody computed (`tests/distributed_table.py`, at first).

    Raises:
        PeftMoeDeltaError: it is such a one.
    """
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise PeftMoeDeltaError(
            "FSDP1 (FullyShardedDataParallel) does not train experts rightly. Use FSDP2: fsdp_version: 2 in "
            "accelerate's config, such as examples/fsdp2.yaml, or torch.distributed.fsdp.fully_shard."
        )


def check_whole(model: nn.Module, verb: str, command: str | None = None) -> None:
    """Refuse what needs the whole model in one process.

    Args:
        model: any part of it.
        verb: what was asked for.
        command: what does it from files; None where the adapter has to be loaded in one process.

    Raises:
        PeftMoeDeltaError: the model is sharded.
    """
    if (engine := sharding_of(model)) is None:
        return
    there = f'load it (PeftModel.from_pretrained(base, "adapter", is_trainable=True)) and call {verb} in one process.'
    raise PeftMoeDeltaError(
        f"{verb} needs all of the model in one process, and {engine} has spread it over several. Save the adapter with "
        f'model.save_pretrained("adapter") on every process. Then {there if command is None else f"run: {command}"}'
    )


def keep_findable(model: Any) -> None:
    """Let a second Trainer find the layers that FSDP2 has wrapped for a first one.

    accelerate looks for them by the names in `_no_split_modules`, and FSDP2 gives what it wraps another class.
    """
    kinds = {type(module).__mro__[:3] for module in model.modules()}
    wrapped = {kind[2].__name__: kind[0].__name__ for kind in kinds if kind[1].__name__ == "FSDPModule"}
    if wrapped:
        model._no_split_modules = [wrapped.get(name, name) for name in model._no_split_modules or ()]


@contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """ZeRO-3's parameters whole, for the length of a block; others are left alone. Every process has to ask."""
    spread = {p.ds_id: p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name == "NOT_AVAILABLE"}
    parts = [spread[key] for key in sorted(spread)]
    if parts:
        parts[0].all_gather(param_list=parts)
    try:
        yield
    finally:
        if parts:
            parts[0].partition(param_list=parts, has_been_updated=False)


def whole_tensors(model: nn.Module, tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a state dict, whole, on every process; every process has to ask.

    Args:
        model: what the state dict is of.
        tensors: by name.
        prefixes: of the names that are wanted.

    Raises:
        CheckpointError: ZeRO-3 has some of them, and whoever made the state dict has left them out.
    """
    wanted = tuple(f"{plain_name(prefix)}." for prefix in prefixes)
    found = {name: tensor for name, tensor in tensors.items() if f"{name}.".startswith(wanted)}
    spread: dict[str, Any] = {
        name: p for name, p in map_plain(model.named_parameters()) if hasattr(p, "ds_id") and name.startswith(wanted)
    }
    if lacking := sorted(spread.keys() - found.keys()):
        raise CheckpointError(
            f"The state dict to save lacks {len(lacking)} of the adapter's tensors, such as {lacking[0]}: with ZeRO-3, "
            "Trainer collects what trains now, and a review freezes the experts. Call "
            'model.save_pretrained("adapter") on every process, without a state dict, and give Trainer '
            'save_strategy="no" in such a stage.'
        )
    return {name: _whole(tensor, spread.get(name)) for name, tensor in found.items()}


def map_plain(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Pairs with plain names."""
    return ((plain_name(name), value) for name, value in named)


def _whole(tensor: Any, parameter: Any) -> Tensor:
    if parameter is None or is_sharded(tensor) or tensor.numel():
        return whole(tensor)
    with gathered([parameter]):
        return parameter.detach().cpu().clone()
