"""A saved adapter as files: what it is about, and its tensors one at a time.

In: the folder that `save_pretrained` wrote. Out: its config, and where in the file each expert, router and further
module lies.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..architectures import layer_index
from ..checkpoint import CheckpointReader, inside, unique_json
from ..errors import CheckpointError, PlanError
from ..plan import ExpertPlan
from ..tuner import MoeDeltaConfig

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.+)\.moe_delta_experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r"(.+)\.moe_delta_router\.(?:weight|grown_(\d+))")


class AdapterFile:
    """A saved adapter.

    Attributes:
        config: its configuration.
        reader: its tensors, in the file's names.
        modules: layer -> name of the MLP that became experts.
        experts: (layer, expert >= 1) -> {name inside the expert: name in the file}.
        routers: layer -> names in the file of the parts whose rows make up the router, in order.
        saved: name in the dense model -> name in the file, of `modules_to_save`.

    Raises:
        CheckpointError: no adapter of this package, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.reader = CheckpointReader(inside(folder, WEIGHTS_FILE))
        self.modules: dict[int, str] = {}
        self.experts: dict[tuple[int, int], dict[str, str]] = {}
        self.routers: dict[int, list[str]] = {}
        self.saved: dict[str, str] = {}
        for key in self.reader:
            name = key.removeprefix(_PREFIX)
            if match := _EXPERT.fullmatch(name):
                self.experts.setdefault((layer_index(match[1]), int(match[2]) + 1), {})[match[3]] = key
            elif match := _ROUTER.fullmatch(name):
                self.modules[layer_index(match[1])] = match[1]
                self.routers.setdefault(layer_index(match[1]), []).append(key)
            elif ".moe_delta_" not in name:
                self.saved[name] = key
        for parts in self.routers.values():  # `weight`, then the rows of groups that were added, in their order
            parts.sort(key=lambda key: int(key.rpartition("grown_")[2]) if "grown_" in key else -1)

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
            layers = sorted(self.modules)
        if blocks != len(layers) or not set(layers) <= set(range(num_layers)):
            raise PlanError(
                f"The adapter transforms {blocks} layers, its file names {sorted(self.modules)} of {num_layers}. Load "
                "it as a model and use merge_and_graft."
            )
        plan = self.config.plan(layers)
        expected = {(layer, e) for layer in plan.layers for e in range(1, plan.num_experts(layer))}
        if expected != set(self.experts) or set(plan.moe_layers) != set(self.routers):
            raise CheckpointError(
                f"{self.reader.path} holds {len(self.experts)} experts in the layers {sorted(self.modules)}, its "
                f"config says {len(expected)} in {list(plan.moe_layers)}. The file is incomplete: fetch it again."
            )
        rows = tuple(plan.counts[plan.layers.index(layer)] for layer in plan.moe_layers)
        return ExpertPlan(plan.moe_layers, plan.groups, rows)


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
