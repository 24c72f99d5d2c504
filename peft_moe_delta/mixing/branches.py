"""`mix`: dense checkpoints that were trained from one seed become the experts of one model.

In: a seed and its branches, Hub ids or folders. Out: a PEFT model over the seed: expert 0 is the seed's MLP, one expert
for each branch holds that branch's MLP (and attention, where attention experts are asked for: BAM, arXiv 2408.08274).
Everything else is the seed's, or an average (BTX, arXiv 2403.07816), which makes a new base checkpoint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader, resolve, whole_folder
from ..errors import PlanError
from ..languages import ORIGINAL_GROUP
from ..loading import load_causal_lm, load_tokenizer
from ..tuner import AdapterRecord, MoeDeltaConfig, MoeDeltaTuner
from ..tuner.fingerprint import base_weights, fingerprint
from ..tuner.initialisation import load_experts
from .checks import check_branch


def mix(
    seed: str | Path,
    branches: Mapping[str, str | Path],
    languages: Mapping[str, str] | None = None,
    *,
    others: str | Mapping[str, float] = "seed",
    base_output: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> PeftModel:
    """A mixture of a seed and dense models trained from it, as an upcycled model in evaluation mode.

    Branches are read one tensor at a time: beside the model itself, no more than one tensor of each is in memory.

    Args:
        seed: the checkpoint the branches started from; its MLP is expert 0, of the group `"original"`.
        branches: group name -> checkpoint of the same architecture, sizes and tokenizer; two or more. Their order is
            that of the experts.
        languages: language code -> group, as in `MoeDeltaConfig`; None names one language after each group.
        others: where the weights that no expert holds come from. `"seed"`: the seed, so that the adapter belongs to the
            seed's own checkpoint and can be grafted. `"average"`: the mean of the seed and all branches. `{group:
            weight}`, with `"original"` for the seed: a weighted mean, weights divided by their sum, 0 where not named.
        base_output: a folder for the model's new base, a dense checkpoint with the averaged weights and the seed's
            MLPs. Needed exactly when `others` is not `"seed"`: an adapter cannot carry those weights.
        dtype: of the base model, as in `from_pretrained`. Experts are fp32, as PEFT keeps them.
        options: further fields of `MoeDeltaConfig`, such as `top_k`, `routing`, `attention_experts`.

    Raises:
        PlanError: fewer than two branches, unusable weights, or options that do not fit.
        CheckpointError: a checkpoint cannot be read, or is not of the seed's architecture, sizes or tokenizer.
    """
    config = mixture_config(seed, branches, languages, others=others, base_output=base_output, **options)
    weights, folder = _weights(branches, others, base_output), resolve(seed)
    readers = {group: CheckpointReader(resolve(path)) for group, path in branches.items()}
    model = load_causal_lm(folder, dtype=dtype)
    model.name_or_path = str(seed)
    mixed = get_peft_model(model, config).eval()
    tuner: Any = mixed.base_model
    load_experts(tuner, readers)
    _warn_of_equal_branches(tuner, branches)
    if base_output is not None:
        _average(tuner, readers, weights)
        _write_base(tuner, folder, base_output)
        config = tuner.active_config
        config.base_model_name_or_path = model.name_or_path = str(base_output)
        blocks = config.record.base_fingerprint["blocks"]
        config.change(base_fingerprint=fingerprint(base_weights(model), blocks))
    return mixed


def mixture_config(
    seed: str | Path,
    branches: Mapping[str, str | Path],
    languages: Mapping[str, str] | None = None,
    *,
    others: str | Mapping[str, float] = "seed",
    base_output: str | Path | None = None,
    **options: Any,
) -> MoeDeltaConfig:
    """The config of a mixture; arguments as of `mix`. Of the checkpoints configs, tokenizers and headers are read.

    Raises:
        PlanError, CheckpointError: as `mix`.
    """
    _weights(branches, others, base_output)
    folder = resolve(seed)
    for path in branches.values():
        check_branch(folder, resolve(path))
    return MoeDeltaConfig(
        languages=dict(languages or {group: group for group in branches}),
        experts=dict.fromkeys(branches, 1),
        record=AdapterRecord(
            mixed={"seed": str(seed), "branches": {g: str(p) for g, p in branches.items()}, "others": others}
        ),
        **options,
    )


def _weights(
    branches: Mapping[str, str | Path], others: str | Mapping[str, float], base_output: str | Path | None
) -> dict[str, float]:
    """Share of each branch in the weights that no expert holds; what is missing to 1 is the seed's."""
    if len(branches) < 2 or ORIGINAL_GROUP in branches:
        raise PlanError(
            f"`branches` must name two or more groups, none of them {ORIGINAL_GROUP!r}, which is the seed's; got "
            f"{list(branches)}. For a single one: get_peft_model(model, ...) and model.load_experts(...)."
        )
    if (others == "seed") != (base_output is None):
        raise PlanError(
            "Averaged weights make a new base model, which needs a folder: `base_output` goes together with any "
            f'`others` but "seed"; got others={others!r}, base_output={base_output!r}.'
        )
    if others == "seed":
        return {}
    if others == "average":
        others = dict.fromkeys((ORIGINAL_GROUP, *branches), 1.0)
    known = {ORIGINAL_GROUP, *branches}
    fine = isinstance(others, Mapping) and set(others) <= known and all(0 <= w < math.inf for w in others.values())
    if not isinstance(others, Mapping) or not fine or not sum(others.values()):
        raise PlanError(
            f'`others` must be "seed", "average", or weights {{group: number}} over {", ".join(sorted(known))}, none '
            f"negative, not all 0; got {others!r}."
        )
    total = sum(others.values())
    return {group: others.get(group, 0.0) / total for group in branches}


@torch.no_grad()
def _average(tuner: MoeDeltaTuner, readers: Mapping[str, CheckpointReader], weights: Mapping[str, float]) -> None:
    """`W_0 + sum_i w_i (W_i - W_0)` for every weight that no expert holds, summed in fp64 and rounded once.

    Written as changes of the seed, so that equal branches give the seed bit for bit.
    """
    in_experts = {
        id(module.base_layer.get_parameter(name))
        for _, _, module in tuner.expert_layers()
        for name, _ in module.experts(tuner.active_adapters[0])[1].named_parameters()
    }
    prefix = f"{tuner.model.base_model_prefix}."
    for name, parameter in tuner.model.named_parameters():
        if id(parameter) in in_experts or ".moe_delta_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        start = parameter.double()
        change = torch.zeros_like(start)
        for group, reader in readers.items():
            stored = name if name in reader else name.removeprefix(prefix)
            change += weights[group] * (reader[stored].to(start.device).double() - start)
        parameter.copy_(start + change)


def _write_base(tuner: MoeDeltaTuner, seed: Path, output: str | Path) -> None:
    """The dense base model under its own names, with the seed's tokenizer."""
    dense: PreTrainedModel = tuner.model
    state: dict[str, Tensor] = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in dense.state_dict().items()
        if ".moe_delta_" not in name
    }
    with whole_folder(output) as folder:
        dense.save_pretrained(folder, state_dict=state)
        if (seed / "tokenizer_config.json").is_file():
            load_tokenizer(seed).save_pretrained(folder)


def _warn_of_equal_branches(tuner: MoeDeltaTuner, branches: Mapping[str, str | Path]) -> None:
    adapter, plan = tuner.active_adapters[0], tuner.plan()
    for group, path in branches.items():
        pairs = (
            (module.base_layer.get_parameter(name), parameter)
            for layer, _, module in tuner.expert_layers()
            for e in plan.experts_of(layer, group)
            for name, parameter in module.experts(adapter)[e].named_parameters()
        )
        if all(torch.equal(seed.to(branch.dtype), branch) for seed, branch in pairs):
            warnings.warn(
                f"The branch {group!r} ({path}) equals the seed in every weight that an expert holds: its expert adds "
                "nothing. Check the path.",
                stacklevel=3,
            )
