"""Remote code: an architecture of its own for what no stock one holds, as one readable file beside the weights.

In: `UpcycledWeights` of any family, with any number of experts a layer and routing learned or by language. Out: a
layout whose folder needs torch, transformers and `trust_remote_code=True`, and not this package. The file is
`modeling_moe_delta.py` for the host at hand, with the source of this package's own routing in the place of its import:
there is no second copy that could drift, and the gate runs the very file that is shipped.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ..architectures import mlp_module_name
from ..routing import LanguageRouting, Routes, choose_experts
from .layout import Layout, add_legacy_rope
from .weights import UpcycledWeights

MODULE = "modeling_moe_delta"
_TEMPLATE = Path(__file__).with_name(f"{MODULE}.py")
_IMPORT = re.compile(r"from \.\.routing\.base import .*\n")
_HOST = re.compile(r"from transformers import (\w+) as (HostConfig|HostModel)")


class RemoteCodeLayout(Layout):
    """The dense host with mixtures in place of its MLPs; routers stay fp32, as the adapter's are."""

    name = "remote code"

    def config(self, weights: UpcycledWeights) -> PretrainedConfig:
        fields = weights.config.to_dict()
        for written_anew in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(written_anew, None)
        table = weights.languages
        moe_delta = {
            "mlp": mlp_module_name(weights.config.model_type),
            "experts": {str(layer): len(weights.selected(layer)) for layer in weights.moe_layers},
            "top_k": weights.top_k,
            "languages": None if table is None else list(table.codes),
        }
        if table is not None:
            counts = dict(zip(weights.plan.layers, weights.plan.counts, strict=True))
            moe_delta["group_of"] = list(table.group_of)
            moe_delta["allowed"] = {
                str(layer): LanguageRouting().allowed_experts(counts[layer]) for layer in weights.moe_layers
            }
        module = modelling_module(weights.config)
        config: PretrainedConfig = module.MoeDeltaConfig(
            **fields,
            moe_delta=moe_delta,
            dtype=weights.dtype,
            architectures=["MoeDeltaForCausalLM"],
            auto_map={
                "AutoConfig": f"{MODULE}.MoeDeltaConfig",
                "AutoModelForCausalLM": f"{MODULE}.MoeDeltaForCausalLM",
            },
        )
        add_legacy_rope(config)
        return config

    def model_class(self, weights: UpcycledWeights) -> type[PreTrainedModel]:
        model_class: type[PreTrainedModel] = modelling_module(weights.config).MoeDeltaForCausalLM
        return model_class

    def files(self, weights: UpcycledWeights) -> Mapping[str, str]:
        return {f"{MODULE}.py": modelling_source(*_host_names(weights.config))}

    def mlp(self, weights: UpcycledWeights, layer: int) -> Iterator[tuple[str, Tensor]]:
        if layer not in weights.moe_layers:
            yield from super().mlp(weights, layer)
            return
        matrix, name = next(iter(weights.mlp_names[layer].items()))
        mlp = name.removesuffix(matrix)
        yield f"{mlp}router.weight", weights.routers(layer)[list(weights.selected(layer))].float()
        for position in range(len(weights.selected(layer))):
            for matrix, tensor in weights.expert(layer, position).items():
                yield f"{mlp}experts.{position}.{matrix}", tensor


def modelling_source(config_class: str, model_class: str) -> str:
    """The modelling file for a host, by the names of its config and model class in transformers."""
    hosts = {"HostConfig": config_class, "HostModel": model_class}
    source = _HOST.sub(
        lambda match: f"from transformers import {hosts[match[2]]} as {match[2]}", _TEMPLATE.read_text(encoding="utf-8")
    )
    routing = "\n\n".join(inspect.getsource(part).rstrip() for part in (Routes, choose_experts))
    return _IMPORT.sub(lambda _: f"from dataclasses import dataclass\n\n\n{routing}\n", source, count=1)


def modelling_module(config: PretrainedConfig) -> ModuleType:
    """The modelling file as a module, in a file of its own, which `save_pretrained` copies beside the weights."""
    return _load(*_host_names(config))


def _host_names(config: PretrainedConfig) -> tuple[str, str]:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return type(config).__name__, model_class.__name__


@lru_cache
def _load(config_class: str, model_class: str) -> ModuleType:
    folder = Path(tempfile.mkdtemp(prefix="moe_delta_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{MODULE}.py"
    path.write_text(modelling_source(config_class, model_class), encoding="utf-8")
    name = f"moe_delta_{config_class}.{MODULE}"  # transformers takes the last part as the file's name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling, dataclasses and `save_pretrained` look it up
    spec.loader.exec_module(module)
    return module
