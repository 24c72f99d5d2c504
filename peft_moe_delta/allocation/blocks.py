"""The decoder layers of a model, as measuring sees them.

In: a causal language model. Out: the MLP of each decoder layer with its matrices, and the layer around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..architectures import OUTSIDE_THE_TEXT_DECODER, layer_index, mlp_module_name, mlp_modules
from ..errors import ArchitectureError


@dataclass(frozen=True)
class Block:
    """One decoder layer: its index, the layer's module, its MLP, and the MLP's matrices by name (no biases)."""

    index: int
    layer: nn.Module
    mlp: nn.Module
    matrices: dict[str, nn.Parameter]


def decoder_blocks(model: PreTrainedModel, target_modules: Sequence[str] | None = None) -> list[Block]:
    """The blocks of a model, ascending.

    Args:
        model: a causal language model without adapters.
        target_modules: the name of the MLP inside a layer, for families that are not known.

    Raises:
        ArchitectureError: an unknown or refused family, a model with adapters, or no MLP of that name.
    """
    if hasattr(model, "peft_config"):
        raise ArchitectureError("The model carries adapters. Measure the base model: load it alone.")
    names = list(target_modules or [mlp_module_name(model.config.model_type)])
    found = [(name, mlp) for target in names for name, mlp in mlp_modules(model, target)]
    if any("language_model." in name for name, _ in found):  # a multimodal model: other towers have MLPs too
        found = [(name, mlp) for name, mlp in found if not re.fullmatch(OUTSIDE_THE_TEXT_DECODER, name)]
    blocks = [
        Block(
            layer_index(name),
            model.get_submodule(name.rpartition(".")[0]),
            mlp,
            {key: parameter for key, parameter in mlp.named_parameters() if parameter.dim() >= 2},
        )
        for name, mlp in found
    ]
    indices = [block.index for block in blocks]
    if not blocks or len(set(indices)) < len(indices):
        raise ArchitectureError(
            f"target_modules {names} match {len(blocks)} modules in the layers {sorted(set(indices))}, expected one "
            "MLP in each decoder layer. Name the MLP inside a layer."
        )
    return sorted(blocks, key=lambda block: block.index)
