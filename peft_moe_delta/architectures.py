"""Where each model family keeps its MLP, and which modules can become experts.

In: a model, or one of its modules. Out: module names, matrices and shapes. Everything that depends on a family's habits
and not on its export format is here; what a module looks like is read from the module itself wherever possible.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .errors import ArchitectureError, PlanError
from .matrices import features, fewest_rows, linear_maps, quantised_weights, unknown_maps

MLP_MODULES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "cohere", "cohere2", "falcon", "bloom", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2",
            "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium", "llama", "mistral", "ministral",
            "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
        ),
        "mlp",
    )
    | {"mpt": "ffn"}
)  # fmt: skip
"""`model_type` -> name of the MLP module inside a decoder layer."""

POSITION_TABLES = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "gptj"})
"""`model_type` of families that look positions up in a table, beyond whose end there is nothing."""

TRANSPOSED_MLP = frozenset({"gpt2"})
"""`model_type` of families whose MLP keeps its matrices as (in, out)."""

ATTENTION_MODULES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "cohere", "granite", "olmo2", "smollm3"), "self_attn")
)
"""`model_type` -> name of a decoder layer's attention module, where attention experts are known to be exact."""

_NO_MLP_MODULE = "its decoder layers keep the MLP's matrices side by side, so there is no MLP module to replace"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "opt": _NO_MLP_MODULE,
        "xglm": _NO_MLP_MODULE,
        "biogpt": _NO_MLP_MODULE,
        "gpt_oss": "its MLP is already a mixture of experts and returns a tuple",
    }
)
"""`model_type` -> why its MLP cannot become experts."""

OUTSIDE_THE_TEXT_DECODER = r"(?!(.*\.)?language_model\.).*"
"""Module names (a regular expression) that are not in a multimodal model's text decoder: other towers have MLPs too."""


def mlp_module_name(model_type: str) -> str:
    """The MLP's module name in a family.

    Raises:
        ArchitectureError: the family is refused, or unknown (then `target_modules` must name the module).
    """
    if model_type in REFUSED:
        raise ArchitectureError(f"{model_type!r} models cannot be upcycled: {REFUSED[model_type]}.")
    if model_type not in MLP_MODULES:
        raise ArchitectureError(
            f"Unknown model type {model_type!r}: cannot tell which module is the MLP. "
            'Name it in the config, for example target_modules=["mlp"].'
        )
    return MLP_MODULES[model_type]


def attention_module_name(model_type: str) -> str:
    """The attention module's name in a family that can have attention experts.

    Raises:
        ArchitectureError: the family's attention is unknown.
    """
    if model_type not in ATTENTION_MODULES:
        raise ArchitectureError(
            f"Attention experts are not known to work in {model_type!r} models, only in: "
            f"{', '.join(ATTENTION_MODULES)}. Leave `attention_experts` out; MLP experts work in every family."
        )
    return ATTENTION_MODULES[model_type]


def layer_index(module_name: str) -> int:
    """The decoder layer a module belongs to: the first number in its dotted name.

    Raises:
        ArchitectureError: the name holds no number.
    """
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_name)
    if match is None:
        raise ArchitectureError(
            f"Module {module_name!r} is not inside a numbered decoder layer. `target_modules` must name MLP blocks."
        )
    return int(match.group(1))


def takes_residual(mlp: nn.Module) -> bool:
    """Whether the MLP is called as `mlp(hidden, residual)` and adds the residual itself (BLOOM, MPT).

    Raises:
        ArchitectureError: the module needs any other set of arguments.
    """
    required = [
        p.name
        for p in inspect.signature(mlp.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 1:
        return False
    if len(required) == 2 and required[1] == "residual":
        return True
    raise ArchitectureError(
        f"{type(mlp).__name__} is called with {required}; experts need a module called as mlp(hidden_states) or "
        "mlp(hidden_states, residual). Choose another module in `target_modules`."
    )


def check_mlp(name: str, mlp: nn.Module, hidden_size: int) -> None:
    """Refuse a module that experts cannot grow beside.

    Raises:
        ArchitectureError: fewer than two matrices, offloaded (meta) weights, quantised ones over which nothing is known
            to train, already a mixture of experts, or not a map from hidden states to hidden states.
    """
    if unknown := unknown_maps(mlp):
        inner, module = next(iter(unknown.items()))
        raise ArchitectureError(
            f"{name}.{inner} is quantised as a {type(module).__module__}.{type(module).__name__}, over which experts "
            "are not known to train. Load the base model in 4 or 8 bit with bitsandbytes, in torchao's weight-only "
            "int8, or dequantised (GGUF: GgufConfig(dequantize=True))."
        )
    parameters = list(mlp.parameters())
    matrices = sum(p.dim() >= 2 for p in parameters)
    if matrices < 2:
        raise ArchitectureError(
            f"{name} ({type(mlp).__name__}) holds {('no matrix', 'one matrix')[matrices]}, where an MLP block holds "
            "two or more. `target_modules` must name MLP blocks, not the linear maps inside them."
        )
    if any(p.is_meta for p in parameters):
        raise ArchitectureError(
            f"The weights of {name} are on the meta device (offloaded or not loaded). Load the base model into memory "
            "first, without disk or CPU offload."
        )
    if any(child.endswith(("experts", "router")) for child, _ in mlp.named_children()):
        raise ArchitectureError(
            f"{name} ({type(mlp).__name__}) is already a mixture of experts; upcycling needs a dense MLP."
        )
    with_residual = takes_residual(mlp)
    if fewest_rows(mlp) or any(hasattr(p, "full_tensor") for p in parameters):
        return  # a call would cost work: bitsandbytes could repack its weights for it, FSDP2 would have to gather them
    nothing = torch.empty(1, 0, hidden_size, dtype=parameters[0].dtype, device=parameters[0].device)
    try:
        # No token, so no work; past any hooks, which may act on what passes.
        result = mlp.forward(nothing, nothing) if with_residual else mlp.forward(nothing)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ArchitectureError(
            f"{name} ({type(mlp).__name__}) cannot be called on hidden states of size {hidden_size} alone: {error}. "
            "`target_modules` must name MLP blocks."
        ) from error
    if not isinstance(result, torch.Tensor) or result.shape != nothing.shape:
        raise ArchitectureError(
            f"{name} ({type(mlp).__name__}) does not return hidden states of size {hidden_size}. `target_modules` must "
            "name MLP blocks."
        )


def check_floats(name: str, block: nn.Module) -> None:
    """Refuse a block of which full experts cannot be copies.

    Raises:
        ArchitectureError: it has quantised weights.
    """
    if quantised := quantised_weights(block):
        kind = str(block.get_parameter(quantised[0]).dtype)
        raise ArchitectureError(
            f"The weights of {name} are quantised ({quantised[0]}: {kind}), and full experts start as exact, trainable "
            "copies of them. Use low-rank experts, which leave them as they are (expert_rank=16), or load the base "
            "model unquantised."
        )


def check_length(model: nn.Module, length: int) -> None:
    """Refuse more tokens than a model has positions, which a lookup beyond the end would not say.

    Raises:
        ArchitectureError: there are more.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) in POSITION_TABLES and length > config.max_position_embeddings:
        raise ArchitectureError(
            f"A row of {length} tokens for {type(model).__name__}, which has {config.max_position_embeddings} "
            "positions. Cut rows to that (max_length), or use a model with more."
        )


def check_low_rank(name: str, mlp: nn.Module, rank: int) -> None:
    """Refuse an MLP that low-rank experts cannot cover.

    Raises:
        ArchitectureError: the MLP keeps parameters outside of its linear maps.
        PlanError: its matrices have no such rank.
    """
    linear = linear_maps(mlp)
    largest = min((min(features(module)) for module in linear.values()), default=rank)
    if rank > largest:
        raise PlanError(
            f"expert_rank={rank} exceeds {largest}, the rank of a matrix of {name} ({type(mlp).__name__}). Take a "
            "smaller one, or full experts (expert_rank=None)."
        )
    stray = [parameter for parameter, _ in mlp.named_parameters() if parameter.rpartition(".")[0] not in linear]
    if stray:
        raise ArchitectureError(
            f"{name} ({type(mlp).__name__}) has parameters outside of its linear maps ({', '.join(stray)}), which "
            "low-rank experts do not cover. Use full experts (expert_rank=None)."
        )


def mlp_modules(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model whose name ends with `.name`, in order of definition."""
    for module_name, module in model.named_modules():
        if module_name.endswith(f".{name}"):
            yield module_name, module
