"""A saved adapter as files: what it is about, and its tensors one at a time.

In: the folder that `save_pretrained` wrote. Out: its config, and where in the file each expert, router, gate, new row
and further module lies.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..architectures import ATTENTION_MODULES, layer_index
from ..checkpoint import CheckpointReader, inside, unique_json
from ..errors import CheckpointError, PlanError
from ..plan import ExpertPlan
from ..tuner import MoeDeltaConfig

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.+)\.moe_delta_experts\.(\d+)\.(.+)")
_ROWS = re.compile(r"(.+)\.moe_delta_(router|classifier)\.(?:weight|grown_(\d+))")
_NEW_TOKENS = re.compile(r"(.+)\.moe_delta_rows\.weight")


@dataclass
class Block:
    """An MLP or an attention module with experts, by names in the adapter's file.

    Attributes:
        module: its name in the dense model.
        experts: expert >= 1 -> {name inside the expert: name in the file}.
        router, classifier: the parts whose rows make up the router, and the gate before it, in order.
    """

    module: str
    experts: dict[int, dict[str, str]] = field(default_factory=dict)
    router: list[str] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)


class AdapterFile:
    """A saved adapter.

    Attributes:
        config: its configuration.
        reader: its tensors, in the file's names.
        mlps, attentions: layer -> the MLP that became experts, the attention module that did.
        saved: name in the dense model -> name in the file, of `modules_to_save`.
        new_rows: name of an embedding in the dense model -> name in the file, of the rows of new tokens.

    Raises:
        CheckpointError: no adapter of this package, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.reader = CheckpointReader(inside(folder, WEIGHTS_FILE))
        self.mlps: dict[int, Block] = {}
        self.attentions: dict[int, Block] = {}
        self.saved: dict[str, str] = {}
        self.new_rows: dict[str, str] = {}
        for key in self.reader:
            name = key.removeprefix(_PREFIX)
            if match := _EXPERT.fullmatch(name):
                self._block(match[1]).experts.setdefault(int(match[2]) + 1, {})[match[3]] = key
            elif match := _ROWS.fullmatch(name):
                block = self._block(match[1])
                (block.router if match[2] == "router" else block.classifier).append(key)
            elif match := _NEW_TOKENS.fullmatch(name):
                self.new_rows[f"{match[1]}.weight"] = key
            elif ".moe_delta_" not in name:
                self.saved[name] = key
        for block in self.blocks:  # `weight`, then the rows of groups that were added, in their order
            for parts in (block.router, block.classifier):
                parts.sort(key=lambda key: int(key.rpartition("grown_")[2]) if "grown_" in key else -1)

    @property
    def blocks(self) -> list[Block]:
        """All of them."""
        return [*self.mlps.values(), *self.attentions.values()]

    def _block(self, module: str) -> Block:
        is_attention = module.rpartition(".")[2] in ATTENTION_MODULES.values()
        return (self.attentions if is_attention else self.mlps).setdefault(layer_index(module), Block(module))

    def plan(self, num_layers: int) -> ExpertPlan:
        """The experts of each layer that has any, checked against what the file holds.

        Args:
            num_layers: decoder layers of the base model.

        Raises:
            PlanError: the config's counts do not fit the model.
            CheckpointError: the file holds other experts than the config says.
        """
        layers = self.config.wanted_layers or list(range(num_layers))
        blocks = (self.config.base_fingerprint or {}).get("blocks", len(layers))
        if blocks != len(layers):  # `target_modules` chose among the layers: only the file says which
            layers = sorted(self.mlps)
        if blocks != len(layers) or not set(layers) <= set(range(num_layers)):
            raise PlanError(
                f"The adapter transforms {blocks} layers, its file names {sorted(self.mlps)} of {num_layers}. Load "
                "it as a model and use merge_and_graft."
            )
        plan = self.config.plan(layers)
        expected = {layer: set(range(1, plan.num_experts(layer))) for layer in plan.moe_layers}
        for part, found in self._parts():
            if {layer: set(block.experts) for layer, block in found.items() if block.router} != expected:
                raise CheckpointError(
                    f"{self.reader.path} holds {sum(len(block.experts) for block in found.values())} {part} experts in "
                    f"the layers {sorted(found)}, its config says {sum(map(len, expected.values()))} in "
                    f"{list(expected)}. The file is incomplete: fetch it again."
                )
        gates = set(self.config.classifier_layers or ()) & set(expected)
        if gates != {layer for layer, block in self.mlps.items() if block.classifier}:
            raise CheckpointError(
                f"{self.reader.path} lacks classifiers of the layers {sorted(gates)}. Fetch it again."
            )
        if bool(self.config.new_tokens) != bool(self.new_rows):
            raise CheckpointError(f"{self.reader.path} lacks the rows of its config's new tokens. Fetch it again.")
        rows = tuple(plan.counts[plan.layers.index(layer)] for layer in plan.moe_layers)
        return ExpertPlan(plan.moe_layers, plan.groups, rows)

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
    except (OSError, json.JSONDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no config of a peft-moe-delta adapter: {error}. Pass the folder that save_pretrained wrote."
        ) from error
