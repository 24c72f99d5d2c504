"""The MLP blocks of a model that a configuration names, and how one becomes an upcycled layer.

In: a causal LM, upcycled already or not, and a `MoeDeltaConfig`. Out: one block a decoder layer, checked.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..architectures import check_floats, check_low_rank, check_mlp, layer_index
from ..errors import ArchitectureError
from .config import MoeDeltaConfig
from .context import ForwardContext
from .layer import MoeDeltaLayer
from .processes import gathered


def mlp_blocks(model: PreTrainedModel, config: MoeDeltaConfig) -> dict[int, tuple[str, nn.Module]]:
    """Decoder layer index -> name and module of the block that a configuration names, upcycled already or not.

    Raises:
        ArchitectureError: a block cannot become experts, carries another adapter, or there are two in a layer.
    """
    blocks: dict[int, tuple[str, nn.Module]] = {}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        raise ArchitectureError(
            "target_modules='all-linear' names every linear map; experts need whole MLP blocks. Leave `target_modules` "
            "out to find them by the model's type, or name the block, for example ['mlp']."
        )
    for name, module in _targets(model, config):
        check_unadapted(name, block_of(module))
        with gathered(block_of(module).parameters()):
            check_mlp(name, block_of(module), hidden_size(model))
            if config.expert_rank is None:
                check_floats(name, block_of(module))
            else:
                check_low_rank(name, block_of(module), config.expert_rank)
        if layer_index(name) in blocks:
            raise ArchitectureError(
                f"`target_modules` {config.target_modules} matches two modules in layer {layer_index(name)}, "
                f"among them {name}. Name exactly one MLP block a layer."
            )
        blocks[layer_index(name)] = name, module
    return blocks


def check_unadapted(name: str, block: nn.Module) -> None:
    """Refuse a block with another method's adapter inside: experts would copy it, and their files would lack it.

    Raises:
        ArchitectureError: there is one.
    """
    foreign = BaseTunerLayer | AuxiliaryTrainingWrapper
    found = next((inner for inner, module in block.named_modules() if isinstance(module, foreign)), None)
    if found is not None:
        raise ArchitectureError(
            f"{f'{name}.{found}'.rstrip('.')} carries an adapter of another PEFT method, which experts would copy but "
            "not save. Merge it into the base model first (merge_and_unload()), then upcycle; or let it leave the "
            "block alone."
        )


def is_target(config: MoeDeltaConfig, name: str) -> bool:
    """Whether PEFT is going to match a module of this name."""
    matched = check_target_module_exists(config, name)
    return bool(matched) and not isinstance(matched, _ExcludedModule)


def _targets(model: nn.Module, config: MoeDeltaConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules PEFT is going to match, without those inside an upcycled layer."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        if is_target(config, name):
            yield name, module


def block_of(block: nn.Module) -> nn.Module:
    """The MLP (or attention) itself, inside an upcycled layer or alone."""
    return block.base_layer if isinstance(block, MoeDeltaLayer) else block


def upcycled(model: PreTrainedModel, name: str, block: nn.Module) -> MoeDeltaLayer:
    """The upcycled layer around an MLP block of the model; put in its place where there is none yet."""
    if isinstance(block, MoeDeltaLayer):
        return block
    layer = MoeDeltaLayer(block, ForwardContext.of(model))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def hidden_size(model: PreTrainedModel) -> int:
    """Of the text decoder."""
    return model.config.get_text_config().hidden_size
