"""Languages as LoRA: for servers that load many of them over one model (vLLM, SGLang, llama.cpp).

In: an adapter with low-rank experts, one for each group and layer, under routing by language or by context. Out: a PEFT
LoRA folder for each new language over the adapter's base, which is the post-trained model once it is grafted. A
language's expert is `P + B A`, and nothing mixes it with others, so its LoRA is `B A` itself: the stored matrices at a
scaling of 1. The share `expert_scale` is in B since the graft. Original languages run on the model without a LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig, PeftModel, TaskType
from torch import Tensor
from transformers import PretrainedConfig

from ..architectures import TRANSPOSED_MLP
from ..checkpoint import ADAPTER_FILES, resolve, whole_folder, write_safetensors
from ..errors import GraftError
from ..export.names import DenseNames
from ..loading import load_config
from ..plan import ExpertPlan
from ..tuner.config import MoeDeltaConfig
from .adapter import WEIGHTS_FILE, Adapter
from .memory import tuner_of

LANGUAGES_FILE = "languages.json"
_PREFIX = "base_model.model."


def to_lora(model: PeftModel | str | Path, folder: str | Path, *, overwrite: bool = False) -> dict[str, str | None]:
    """Write a LoRA folder for each new language, exact to rounding, and `languages.json`, which says which is whose.

    Args:
        model: a grafted adapter, in memory (`model.graft(...)`) or as a folder or Hub id. One that is not grafted gives
            LoRA folders over the base model.
        folder: where to write; the folder of a language is called by its code.
        overwrite: whether to replace a folder that holds files.

    Returns:
        Language -> the name of its folder; None for languages that run on the model as it is.

    Raises:
        GraftError: experts that no LoRA is equal to. The message says what to do.
        CheckpointError: no such adapter, or nothing can be written there.
    """
    if isinstance(model, PeftModel):
        adapter = Adapter.of_model(tuner_of(model))
        base = tuner_of(model).model.config
    else:
        adapter = Adapter.of_folder(resolve(model, files=ADAPTER_FILES))
        base = load_config(str(adapter.config.base_model_name_or_path))
    config = adapter.config
    plan = adapter.plan(base.get_text_config().num_hidden_layers)
    _check(config, plan)
    table, names = config.language_table, DenseNames(base).parameters
    made: dict[str, str | None] = {}
    with whole_folder(folder, overwrite=overwrite) as partial:
        for code in table.codes:
            group = table.groups[table.group_of[table.id_of(code)]]
            parts = list(_parts(adapter, plan, group))
            made[code] = code if parts else None
            if parts:
                _lora_config(config, base, parts, names).save_pretrained(str(partial / code))
                tensors = {f"{_PREFIX}{part.module}.lora_{part.side}.weight": part.tensor for part in parts}
                write_safetensors(partial / code / WEIGHTS_FILE, tensors, {"language": code, "group": group})
        said = {"base_model": config.base_model_name_or_path, "languages": made}
        (partial / LANGUAGES_FILE).write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")
    return made


class _Part(NamedTuple):
    """A matrix of a LoRA: `side` "A", (rank, in), or "B", (out, rank), of a linear map in a decoder layer's block."""

    layer: int
    block: str
    inner: str
    side: str
    tensor: Tensor

    @property
    def module(self) -> str:
        return f"{self.block}.{self.inner}"


def _parts(adapter: Adapter, plan: ExpertPlan, group: str) -> Iterator[_Part]:
    """What a group's experts are made of; nothing where it has none."""
    for layer, expert, block, keys in adapter.experts():
        if expert in plan.experts_of(layer, group):
            for name, key in keys.items():
                inner, _, side = name.rpartition(".")
                yield _Part(layer, block.module, inner, side, adapter.tensors[key])


def _lora_config(
    config: MoeDeltaConfig, base: PretrainedConfig, parts: Sequence[_Part], names: Sequence[str]
) -> LoraConfig:
    layers = sorted({part.layer for part in parts})
    every = layers == list(range(base.get_text_config().num_hidden_layers))
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        r=config.expert_rank or 0,
        lora_alpha=config.expert_rank or 0,  # a scaling of 1
        target_modules=sorted({_target(part, names) for part in parts}),
        layers_to_transform=None if every else layers,
        fan_in_fan_out=base.model_type in TRANSPOSED_MLP,
    )


def _target(part: _Part, names: Sequence[str]) -> str:
    """The end of a module's name by which PEFT finds it: as short as servers like it, where it is not another's too."""
    longer = f"{part.block.rpartition('.')[2]}.{part.inner}"
    others = [n for n in names if n.endswith(f".{part.inner}.weight") and not n.endswith(f".{longer}.weight")]
    return longer if others else part.inner


def _check(config: MoeDeltaConfig, plan: ExpertPlan) -> None:
    """Refuse an adapter that is not, language by language, a LoRA.

    Raises:
        GraftError: see there.
    """
    if not config.routing_rule.needs_language:
        raise GraftError(
            f"Routing {config.routing!r} mixes experts token by token, which no LoRA does. Export a stock checkpoint "
            "(to_stock, `peft-moe-delta graft`); languages as LoRA need routing by language or by context."
        )
    if config.expert_rank is None:
        raise GraftError(
            "Its experts are full copies of the MLP, and a LoRA holds a change of low rank only. Export each language "
            "as a dense model (language=...), or train with expert_rank=16 or so."
        )
    many = {group for group in plan.groups for layer in plan.layers if len(plan.experts_of(layer, group)) > 1}
    if many:
        raise GraftError(
            f"Groups {sorted(many)} have several experts in a layer, and a LoRA is one. Export their languages as "
            "stock mixtures (language=...), or train with one expert for each group."
        )
    if config.record.new_tokens or config.modules_to_save:
        raise GraftError(
            f"The adapter trains more than experts: {len(config.record.new_tokens)} new tokens and the modules "
            f"{list(config.modules_to_save or ())}, which few servers take in a LoRA. Export each language as a dense "
            "model (language=...)."
        )
