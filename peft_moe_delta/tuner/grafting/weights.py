"""The dense weights of an upcycled model in memory, under the dense model's own names.

In: the tuner. Out: weights of its base model, or those in force where an adapter trains some of them itself.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..vocabulary import grown_layers

if TYPE_CHECKING:
    from ..model import MoeDeltaModel


def tuner_of(model: PeftModel) -> MoeDeltaModel:
    """The upcycled model inside PEFT's wrapper, which calls it just a module."""
    return cast("MoeDeltaModel", model.base_model)


def base_weights(tuner: MoeDeltaModel) -> dict[str, Tensor]:
    """The dense base model's weights under its own names."""
    state = {}
    for name, tensor in tuner.model.state_dict().items():
        if ".moe_delta_" in name or ".modules_to_save." in name:
            continue
        state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return state


def trained_weights(tuner: MoeDeltaModel) -> dict[str, Tensor]:
    """The dense weights in force: the base model's, with the active adapter's `modules_to_save` in place."""
    state = base_weights(tuner)
    for name, module in saved_modules(tuner, tuner.active_adapters[0]):
        state |= {f"{name}.{key}": parameter.detach() for key, parameter in module.named_parameters()}
    for layer in grown_layers(tuner.model) or ():
        if layer.in_force is not None:
            state[f"{_name_of(tuner.model, layer)}.weight"] = layer.grown_weight(layer.in_force)
    return state


def saved_modules(tuner: MoeDeltaModel, adapter_name: str) -> list[tuple[str, nn.Module]]:
    """`(name, module)` of what an adapter trains whole, beside its experts (`modules_to_save`)."""
    return [
        (name, module.modules_to_save[adapter_name])
        for name, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]


def config_in_force(tuner: MoeDeltaModel) -> PretrainedConfig:
    """The dense model's config, with the vocabulary in force."""
    config = tuner.model.config
    grown = grown_layers(tuner.model)
    if grown is None or grown[0].in_force is None:
        return config
    config = copy.deepcopy(config)
    config.vocab_size = len(grown[0].grown_weight(grown[0].in_force))
    return config


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)
