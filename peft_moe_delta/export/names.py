"""A dense model's tensors by name: as the model calls them, and as its files do.

In: a config, and the names in a checkpoint. Out: which tensor of the file is which of the model, by the rules of
transformers' own loader: renamed parts (GPT-NeoX's `embed_out` is `lm_head`), a base model's prefix that is there or
not, and buffers of old files that models compute themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from ..errors import CheckpointError


class DenseNames:
    """The names of the tensors of the model that a config describes.

    Attributes:
        model: that model on the meta device, without weights.

    Raises:
        CheckpointError: the config is of no causal LM that transformers knows, or damaged.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        try:
            with torch.device("meta"):
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=config.dtype or torch.float32, trust_remote_code=False
                )
        except Exception as error:  # whatever the config's numbers make a module stumble over
            raise CheckpointError(
                f"No model can be built from the config of {config.name_or_path or config.model_type!r}: {error}."
            ) from error

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Parameters in the order of definition, tied ones under each of their names."""
        return tuple(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Tied tensor -> the one that it shares, as the config says."""
        return dict(self.model.get_expanded_tied_weights_keys(all_submodels=True))

    def in_model(self, stored: Iterable[str]) -> dict[str, str]:
        """Name in the model -> name in a file, in the file's order; without what the model does not have.

        Raises:
            CheckpointError: the file keeps weights in a form that loading converts.
        """
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        names = {}
        for key in stored:
            name, converter = rename_source_key(key, renamings, converters, prefix, state)
            if converter is not None:
                raise CheckpointError(
                    f"{key} is stored in a form that transformers converts when it loads the model, which works in "
                    "memory only. Use merge_and_graft."
                )
            if name in state:
                names[name] = key
        return names

    def on_disk(self, name: str) -> str:
        """What `save_pretrained` calls a tensor of the model."""
        renamed: str = apply_renamings(name, self._reverse)
        return renamed

    @cached_property
    def _reverse(self) -> list[Any]:
        rules = get_model_conversion_mapping(self.model, add_legacy=False)
        return [rule.reverse_transform() for rule in reversed(rules) if type(rule) is WeightRenaming]
