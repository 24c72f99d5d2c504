"""Remote code: an architecture of its own for what no stock one holds, as one readable file beside the weights.

In: `UpcycledWeights` of any family, with any number of experts a layer, any routing, and attention experts. Out: a
layout whose folder needs torch, transformers and `trust_remote_code=True`, and not this package. The file is
`modeling_moe_delta.py` for the host at hand, with the source of this package's own routing in the place of its import
and, for attention experts, of their caches: there is no second copy that could drift, and the gate runs the very file
that is shipped.
"""

from __future__ import annotations

import ast
import atexit
import importlib.util
import inspect
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from ..architectures import attention_module_name, mlp_module_name
from ..attention import Borrowed, OwnSlot, SharedKeyValues, cache_slots
from ..engines import REMOTE_CODE
from ..routing import LanguageRouting, Routes, choose_experts, classifier_logits, recognised, router_logits
from ..routing.context import EvidenceSteps, PassTokens, TokenMemory, recognise
from .layout import Layout, add_legacy_rope
from .weights import UpcycledWeights

MODULE = "modeling_moe_delta"
_TEMPLATE = Path(__file__).with_name(f"{MODULE}.py")
_ATTENTION_TEMPLATE = Path(__file__).with_name("modeling_attention.py")
_CONTEXT_TEMPLATE = Path(__file__).with_name("modeling_context.py")
_CONTEXT = (EvidenceSteps, recognise, TokenMemory, PassTokens)
_IMPORT = re.compile(r"from \.\.routing import .*\n")
_IMPORTED = {
    "import inspect\n": "from dataclasses import dataclass\n",
    "from torch import Tensor, nn\n": "from torch.nn import functional as F\n",
}
"""Line of the template -> what is imported beside it by the sources that go into the file."""
_ROUTING = (Routes, router_logits, choose_experts, classifier_logits, recognised)
_ATTENTION: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "shared_kv": ((Borrowed, SharedKeyValues), "SharedAttention"),
    "full": ((OwnSlot, cache_slots), "OwnAttention"),
}
"""Kind of attention experts -> what they use of `attention`, and their class in the template."""
_FOR_OUR_LINTERS = re.compile(r"  # (?:noqa|type): .*")
_HOST = re.compile(r"from transformers import (\w+) as (HostConfig|HostBase|HostModel)")


class RemoteCodeLayout(Layout):
    """The dense host with mixtures in place of its MLPs; routers stay fp32, as the adapter's are."""

    @property
    def name(self) -> str:
        return REMOTE_CODE

    def config(self, weights: UpcycledWeights) -> PretrainedConfig:
        fields = weights.config.to_dict()
        for written_anew in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(written_anew, None)
        table = weights.languages
        moe_delta: dict[str, Any] = {
            "parts": {mlp_module_name(weights.config.model_type): "mlp"},
            "experts": {str(layer): len(weights.selected(layer)) for layer in weights.moe_layers},
            "top_k": weights.top_k,
            "norm_topk_prob": weights.renormalise,
            "classifiers": {str(layer): len(rows()) for layer, rows in weights.classifiers.items()},
            "languages": None if table is None else list(table.codes),
        }
        if weights.attention is not None:
            moe_delta["parts"][attention_module_name(weights.config.model_type)] = "attention"
        if table is not None:
            counts = dict(zip(weights.plan.layers, weights.plan.counts, strict=True))
            moe_delta["group_of"] = list(table.group_of)
            moe_delta["allowed"] = {
                str(layer): LanguageRouting().allowed_experts(counts[layer]) for layer in weights.moe_layers
            }
        if weights.identifier is not None:
            found = weights.identifier
            moe_delta["identifier"] = {
                "shape": [found.vocabulary, len(found.group_of) - 1],
                "memory": found.memory,
                "threshold": found.threshold,
                "group_of": list(found.group_of),
            }
        module, name = modelling_module(weights), _class_name(weights)
        config: PretrainedConfig = module.MoeDeltaConfig(
            **fields,
            moe_delta=moe_delta,
            dtype=weights.dtype,
            architectures=[name],
            auto_map={f"Auto{kind}": f"{MODULE}.{owner}" for kind, owner in _auto_classes(weights).items()},
        )
        add_legacy_rope(config)
        return config

    def model_class(self, weights: UpcycledWeights) -> type[PreTrainedModel]:
        model_class: type[PreTrainedModel] = getattr(modelling_module(weights), _class_name(weights))
        return model_class

    def tensors(self, weights: UpcycledWeights) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors(weights)
        if weights.identifier is not None:
            yield "identifier_scores", weights.identifier.scores()

    def files(self, weights: UpcycledWeights) -> Mapping[str, str]:
        return {f"{MODULE}.py": modelling_source(*_names(weights))}

    def on_disk(self, weights: UpcycledWeights) -> Callable[[str], str]:
        return str  # an architecture of its own is saved under the names that it has in memory

    def mlp(self, weights: UpcycledWeights, layer: int) -> Iterator[tuple[str, Tensor]]:
        if layer not in weights.moe_layers:
            yield from super().mlp(weights, layer)
            return
        matrix, name = next(iter(weights.mlp_names[layer].items()))
        mlp = name.removesuffix(matrix)
        yield f"{mlp}router.weight", weights.routers(layer)[list(weights.selected(layer))].float()
        if layer in weights.classifiers:
            yield f"{mlp}classifier.weight", weights.classifiers[layer]().float()
        for position in range(len(weights.selected(layer))):
            for matrix, tensor in weights.expert(layer, position).items():
                yield f"{mlp}experts.{position}.{matrix}", tensor

    def outside_mlp(self, weights: UpcycledWeights, name: str) -> Iterator[tuple[str, Tensor]]:
        layer = next((n for n in weights.moe_layers if name in weights.attention_names.get(n, {}).values()), None)
        if weights.attention is None or layer is None:
            yield from super().outside_mlp(weights, name)
            return
        inner, first = next(iter(weights.attention_names[layer].items()))
        if name != first:
            return  # all of a layer's attention comes with its first tensor
        prefix, selected = name.removesuffix(inner), weights.selected(layer)
        yield f"{prefix}router.weight", weights.attention.routers(layer)[list(selected)].float()
        for position in range(len(selected)):
            for key, tensor in weights.attention_expert(layer, position).items():
                borrowed = weights.attention.kind == "shared_kv" and key.partition(".")[0] in Borrowed.PARTS
                if position == 0 or not borrowed:
                    yield f"{prefix}experts.{position}.{key}", tensor


def modelling_source(
    config_class: str, base_class: str, model_class: str, attention: str | None = None, context: bool = False
) -> str:
    """The modelling file for a host.

    Args:
        config_class, base_class, model_class: names, in transformers, of its config, of its decoder without a head, and
            of its model.
        attention: kind of attention experts; None without.
        context: whether languages are read from the text.
    """
    hosts = {"HostConfig": config_class, "HostBase": base_class, "HostModel": model_class}
    source = _HOST.sub(
        lambda match: f"from transformers import {hosts[match[2]]} as {match[2]}", _TEMPLATE.read_text(encoding="utf-8")
    )
    source = _FOR_OUR_LINTERS.sub("", source)
    source = _IMPORT.sub(lambda _: f"\n{_sources(_ROUTING)}\n", source, count=1)
    for line, also in _IMPORTED.items():
        source = source.replace(line, line + also, 1)
    if context:
        source = _with_context(source)
    if attention is None:
        return source
    used, name = _ATTENTION[attention]
    parts = [_sources(used), *(_definition(_ATTENTION_TEMPLATE, part) for part in ("AttentionMixture", name))]
    # Errors of this package are ValueErrors, which is what they are where it is not installed.
    text = re.sub(r"\b(Language|Architecture)Error\b", "ValueError", "\n\n\n".join(parts))
    source = source.replace("import inspect\n", "import inspect\nfrom collections.abc import Iterator\n", 1)
    before, config, after = source.partition("class MoeDeltaConfig")
    return f'{before}{text}\n\n\nMIXTURES["attention"] = {name}\n\n\n{config}{after}'


def _sources(parts: Iterable[Any]) -> str:
    return "\n\n\n".join(inspect.getsource(part).rstrip() for part in parts)


def _with_context(source: str) -> str:
    """The modelling file with the part that reads languages from the text."""
    source = source.replace("abc import Iterator\n", "abc import Iterator, Mapping\n", 1)
    cache = "from transformers.cache_utils import Cache, DynamicLayer\n"
    source = source.replace(
        "from torch.nn import functional as F\n", f"from torch.nn import functional as F\n{cache}", 1
    )
    before, config, after = source.partition("class MoeDeltaConfig")
    name = "MoeDeltaContextForCausalLM"
    return (
        f"{before}{_sources(_CONTEXT)}\n\n\n{config}{after}\n\n{_definition(_CONTEXT_TEMPLATE, name)}\n\n\n"
        f'{name}.register_for_auto_class("AutoModelForCausalLM")\n'
    )


def _auto_classes(weights: UpcycledWeights) -> dict[str, str]:
    """Kind of auto class -> class of the modelling file; the decoder without its head has no input for languages."""
    found = {"Config": "MoeDeltaConfig", "ModelForCausalLM": _class_name(weights)}
    return found if weights.languages is not None else {**found, "Model": "MoeDeltaModel"}


def _class_name(weights: UpcycledWeights) -> str:
    return "MoeDeltaForCausalLM" if weights.identifier is None else "MoeDeltaContextForCausalLM"


def _definition(template: Path, name: str) -> str:
    """A class of a template, which is read without importing a host's modelling code."""
    source = template.read_text(encoding="utf-8")
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    definition = ast.get_source_segment(source, node)
    assert definition is not None
    return _FOR_OUR_LINTERS.sub("", definition)


def modelling_module(weights: UpcycledWeights) -> ModuleType:
    """The modelling file as a module, in a file of its own, which `save_pretrained` copies beside the weights."""
    return _load(*_names(weights))


def _names(weights: UpcycledWeights) -> tuple[str, str, str, str | None, bool]:
    """What `modelling_source` takes."""
    kind = type(weights.config)
    base_class: Any = MODEL_MAPPING[kind]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    attention = None if weights.attention is None else weights.attention.kind
    return kind.__name__, base_class.__name__, model_class.__name__, attention, weights.identifier is not None


@lru_cache
def _load(config_class: str, base_class: str, model_class: str, attention: str | None, context: bool) -> ModuleType:
    folder = Path(tempfile.mkdtemp(prefix="moe_delta_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{MODULE}.py"
    path.write_text(modelling_source(config_class, base_class, model_class, attention, context), encoding="utf-8")
    # transformers takes the last part as the file's name
    name = f"moe_delta_{config_class}_{attention}_{context}.{MODULE}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling, dataclasses and `save_pretrained` look it up
    spec.loader.exec_module(module)
    return module
