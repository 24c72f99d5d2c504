"""An adapter's tensors: which expert, router, gate, row or module each of them is.

In: the folder that `save_pretrained` wrote, or the model in memory, whose tensors PEFT gives under the same names. Out:
its config, and the place of everything among them. Nothing else reads these names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft import get_peft_model_state_dict

from ..architectures import ATTENTION_MODULES, layer_index
from ..checkpoint import CheckpointReader, first_few, inside, unique_json
from ..errors import CheckpointError, PlanError
from ..plan import ExpertPlan
from ..tensors import Held, Tensors
from ..tuner import MoeDeltaConfig, MoeDeltaTuner

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.+)\.moe_delta_experts\.(\d+)\.(.+)")
_ROWS = re.compile(r"(.+)\.moe_delta_(router|classifier)\.(?:weight|grown_(\d+))")
_IDENTIFIER = "moe_delta_identifiers.counts"
_NEW_TOKENS = re.compile(r"(.+)\.moe_delta_rows\.weight")


@dataclass
class Block:
    """An MLP or an attention module with experts, by names among the adapter's tensors.

    Attributes:
        module: its name in the dense model.
        experts: expert >= 1 -> {name inside the expert: name of the tensor}.
        router, classifier: the tensors whose rows make up the router, and the gate before it, in order.
    """

    module: str
    experts: dict[int, dict[str, str]] = field(default_factory=dict)
    router: list[str] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)


class Adapter:
    """An adapter.

    Attributes:
        config: its configuration.
        tensors: its tensors, in the file's names.
        source: what errors call it.
        mlps, attentions: layer -> the MLP that became experts, the attention module that did.
        saved: name in the dense model -> name here, of `modules_to_save`.
        identifier: name of the token counts by which languages are told apart; None where there are none.
        new_rows: name of an embedding in the dense model -> name here, of the rows of new tokens.
        changed: name in the dense model -> name here, of base weights that PEFT saves along: embeddings that were
            resized.

    Raises:
        CheckpointError: it holds parts that this version does not know.
    """

    def __init__(self, config: MoeDeltaConfig, tensors: Tensors, source: str) -> None:
        self.config, self.tensors, self.source = config, tensors, source
        self.mlps: dict[int, Block] = {}
        self.attentions: dict[int, Block] = {}
        self.saved: dict[str, str] = {}
        self.identifier: str | None = None
        self.new_rows: dict[str, str] = {}
        self.changed: dict[str, str] = {}
        for key in tensors:
            self._enter(key, key.removeprefix(_PREFIX))
        for block in self.blocks:  # `weight`, then the rows of groups that were added, in their order
            for parts in (block.router, block.classifier):
                parts.sort(key=lambda key: int(key.rpartition("grown_")[2]) if "grown_" in key else -1)

    @classmethod
    def of_folder(cls, folder: Path) -> Adapter:
        """A saved adapter, whose tensors are read as they are asked for.

        Raises:
            CheckpointError: no adapter of this package, or a damaged one.
        """
        reader = CheckpointReader(inside(folder, WEIGHTS_FILE))
        return cls(_read_config(folder), reader, str(reader.path))

    @classmethod
    def of_model(cls, tuner: MoeDeltaTuner) -> Adapter:
        """The active adapter of a model in memory."""
        name = tuner.active_adapters[0]
        state = get_peft_model_state_dict(tuner, adapter_name=name, save_embedding_layers=False)
        tensors = {f"base_model.{key}": tensor.detach() for key, tensor in state.items()}
        return cls(tuner.peft_config[name], Held(tensors), f"The adapter {name!r}")

    def _enter(self, key: str, name: str) -> None:
        if match := _EXPERT.fullmatch(name):
            self._block(match[1]).experts.setdefault(int(match[2]) + 1, {})[match[3]] = key
        elif match := _ROWS.fullmatch(name):
            block = self._block(match[1])
            (block.router if match[2] == "router" else block.classifier).append(key)
        elif name == _IDENTIFIER:
            self.identifier = key
        elif match := _NEW_TOKENS.fullmatch(name):
            self.new_rows[f"{match[1]}.weight"] = key
        elif "moe_delta_" in name:
            raise CheckpointError(f"{self.source} holds {key}, which this version of the package does not know.")
        elif self._is_saved(name):
            self.saved[name] = key
        else:
            self.changed[name] = key

    def _block(self, module: str) -> Block:
        is_attention = module.rpartition(".")[2] in ATTENTION_MODULES.values()
        return (self.attentions if is_attention else self.mlps).setdefault(layer_index(module), Block(module))

    def _is_saved(self, name: str) -> bool:
        """Whether a tensor belongs to a module of `modules_to_save`, which PEFT finds by the ends of module names."""
        parts = name.split(".")
        owners = [".".join(parts[:length]) for length in range(1, len(parts))]
        return any(owner.endswith(module) for owner in owners for module in self.config.modules_to_save or ())

    @property
    def blocks(self) -> list[Block]:
        """All of them."""
        return [*self.mlps.values(), *self.attentions.values()]

    def experts(self) -> Iterator[tuple[int, int, Block, Mapping[str, str]]]:
        """(layer, expert, block, {name inside the expert: name of the tensor}) of every new expert."""
        for blocks in (self.mlps, self.attentions):
            for layer, block in blocks.items():
                for expert, keys in block.experts.items():
                    yield layer, expert, block, keys

    def plan(self, num_layers: int) -> ExpertPlan:
        """The experts of each layer that has any, checked against what there is.

        Args:
            num_layers: decoder layers of the base model.

        Raises:
            PlanError: the config's counts do not fit the model.
            CheckpointError: there are other experts than the config says.
        """
        layers = self.config.wanted_layers or list(range(num_layers))
        blocks = (self.config.record.base_fingerprint or {}).get("blocks", len(layers))
        if blocks != len(layers):  # `target_modules` chose among the layers: only the tensors say which
            layers = sorted(self.mlps)
        if blocks != len(layers) or not set(layers) <= set(range(num_layers)):
            raise PlanError(
                f"The adapter transforms {blocks} layers, its tensors name {sorted(self.mlps)} of {num_layers}. It "
                "belongs to another model."
            )
        plan = self.config.plan(layers)
        expected = {layer: set(range(1, plan.num_experts(layer))) for layer in plan.moe_layers}
        for part, found in self._parts():
            if {layer: set(block.experts) for layer, block in found.items() if block.router} != expected:
                raise CheckpointError(
                    f"{self.source} holds {sum(len(block.experts) for block in found.values())} {part} experts in "
                    f"the layers {sorted(found)}, its config says {sum(map(len, expected.values()))} in "
                    f"{list(expected)}. The file is incomplete: fetch it again."
                )
        gates = set(self.config.classifier_layers or ()) & set(expected)
        if gates != {layer for layer, block in self.mlps.items() if block.classifier}:
            raise CheckpointError(f"{self.source} lacks classifiers of the layers {sorted(gates)}. Fetch it again.")
        if bool(self.config.record.new_tokens) != bool(self.new_rows):
            raise CheckpointError(f"{self.source} lacks the rows of its config's new tokens. Fetch it again.")
        if (self.config.record.identifier is None) != (self.identifier is None):
            raise CheckpointError(f"{self.source} lacks the token counts of its config's identifier. Fetch it again.")
        rows = tuple(plan.counts[plan.layers.index(layer)] for layer in plan.moe_layers)
        return ExpertPlan(plan.moe_layers, plan.groups, rows)

    def check_names(self, dense: Mapping[str, object]) -> None:
        """Refuse an adapter with parts that a dense model lacks.

        Raises:
            CheckpointError: see there.
        """
        unknown = {*self.saved, *self.new_rows} - set(dense)
        if unknown:
            raise CheckpointError(
                f"{self.source} holds {first_few(sorted(unknown))}, which the post-trained model lacks. It belongs to "
                "another model, or needs a newer version of this package."
            )

    def _parts(self) -> list[tuple[str, dict[int, Block]]]:
        attention = [("attention", self.attentions)] if self.config.attention_experts else []
        return [("MLP", self.mlps), *attention]


def _read_config(folder: Path) -> MoeDeltaConfig:
    path = inside(folder, CONFIG_FILE)
    try:
        fields = unique_json(path.read_text(encoding="utf-8"))
        if fields.get("peft_type") != "MOE_DELTA":
            raise ValueError(f"peft_type is {fields.get('peft_type')!r} instead of 'MOE_DELTA'")
        config: MoeDeltaConfig = MoeDeltaConfig.from_pretrained(str(folder))
        return config
    except CheckpointError:
        raise
    except (OSError, json.JSONDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no config of a peft-moe-delta adapter: {error}. Pass the folder that save_pretrained wrote."
        ) from error
