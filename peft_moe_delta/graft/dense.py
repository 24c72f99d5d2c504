"""A dense model, in memory or as files: its config, and its tensors under the names that they have in the model.

In: a model, or a folder. Out: the same either way: whatever spelling a file uses, tied embeddings stored once or twice,
a head of its own under a config that says it is tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoint import CheckpointReader, first_few, inside
from ..errors import CheckpointError, GraftError
from ..export.names import DenseNames
from ..loading import load_config
from ..matrices import is_quantised, quantised_weights
from ..tensors import Held, Tensors, View


@dataclass(frozen=True)
class Dense:
    """A dense model.

    Attributes:
        config: its config.
        tensors: its parameters and buffers; tied ones under each of their names.
        tied: tied tensor -> the one it shares, where the two are one indeed.
        order: its parameters in the order of definition.
    """

    config: PretrainedConfig
    tensors: Tensors
    tied: Mapping[str, str]
    order: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, tied ones once."""
        return tuple(name for name in self.tensors if name not in self.tied)

    @classmethod
    def of_model(cls, model: PreTrainedModel, *, copy: bool = False) -> Dense:
        """A model in memory; of an upcycled one, the base model that lies under its adapters.

        Args:
            copy: whether to copy its weights, which may then change.

        Raises:
            GraftError: it is quantised.
        """
        if quantised := quantised_weights(model):
            raise GraftError(
                f"The {type(model).__name__} in memory is quantised ({first_few(quantised)}), and a graft computes "
                "with the weights themselves. Save the adapter and graft from files, with the unquantised checkpoints: "
                "graft_checkpoint(base, post_trained, adapter, output), or `peft-moe-delta graft`."
            )
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if "moe_delta_" not in name and ".modules_to_save." not in name:
                state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
        tied = {
            target: source
            for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
            if target in state and source in state and state[target].data_ptr() == state[source].data_ptr()
        }
        if copy:
            state = {name: tensor.clone() for name, tensor in state.items() if name not in tied}
            state |= {target: state[source] for target, source in tied.items()}
        return cls(model.config, Held(state), tied, tuple(state))

    @classmethod
    def of_files(
        cls, tensors: Tensors, config: PretrainedConfig, source: Path, changed: Mapping[str, tuple[Tensors, str]] = {}
    ) -> Dense:  # fmt: skip
        """A checkpoint.

        Args:
            tensors: by the file's names.
            config: the model's.
            source: what errors call it.
            changed: name in the model -> tensors and name there, of what stands in the place of the checkpoint's own.

        Raises:
            CheckpointError: it lacks weights of the model, or has them quantised.
        """
        names = DenseNames(config)
        places = {name: (tensors, stored) for name, stored in names.in_model(tensors).items()} | dict(changed)
        tied = {}
        for target, shared in names.tied.items():
            if target in places and shared in places:
                if not _equal(places[target], places[shared]):
                    continue  # a head of its own: loading the model would not tie it either
            elif target in places:
                places[shared] = places[target]
            elif shared in places:
                places[target] = places[shared]
            tied[target] = shared
        missing = [name for name in names.parameters if name not in places]
        present = ((name, *places[name]) for name in names.parameters if name in places)
        packed = [name for name, held, stored in present if is_quantised(held.meta(stored))]
        if packed or (missing and getattr(config, "quantization_config", None)):
            raise CheckpointError(
                f"{source} is quantised ({first_few(packed or missing)}), and a graft computes with the weights "
                "themselves. Pass the unquantised checkpoint that it was made from; the adapter is the same for both."
            )
        if missing:
            raise CheckpointError(
                f"{source} lacks {first_few(missing)} of a {type(names.model).__name__}: loaded, they would be "
                "random. The checkpoint is incomplete or another model's: fetch it again."
            )
        return cls(config, View(places), tied, names.parameters)

    @classmethod
    def of_folder(cls, folder: Path) -> Dense:
        """A checkpoint's folder."""
        return cls.of_files(CheckpointReader(folder), read_config(folder), folder)


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not of a model that transformers knows.
    """
    inside(folder, "config.json")
    return load_config(folder, trust_remote_code=False)


def _equal(first: tuple[Tensors, str], second: tuple[Tensors, str]) -> bool:
    one, other = (tensors[name] for tensors, name in (first, second))
    return one.dtype == other.dtype and torch.equal(one, other)
