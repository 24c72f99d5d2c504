"""Experts that start from other dense checkpoints of the base model's architecture (DMoE, BTX, BAM).

In: an upcycled model and, for a language group, a dense checkpoint, or one for each of its experts. Out: the group's
experts hold the weights of those checkpoints. Tensors are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointReader, first_few, resolve
from ..errors import CheckpointError, PlanError
from .base import MoeDeltaTuner
from .experts import LowRankLinear

Source = str | Path | Mapping[str, Tensor]
"""A dense checkpoint: a folder, a Hub id, or tensors by name (a `CheckpointReader` reads them lazily)."""


@torch.no_grad()
def load_experts(tuner: MoeDeltaTuner, checkpoints: Mapping[str, Source | Sequence[Source]]) -> None:
    """Give groups' experts the weights that dense checkpoints have in their place.

    Every name and shape is checked before the first weight changes; routers stay as they are.

    Args:
        tuner: the upcycled model; its active adapter's experts are filled.
        checkpoints: group -> checkpoint for all its experts, or a list with one for each.

    Raises:
        PlanError: an unknown group, low-rank experts, or a list that does not fit the group's experts.
        CheckpointError: a checkpoint cannot be read, or lacks a tensor, or has it in another shape.
    """
    known = tuner.plan().groups[1:]
    if not set(checkpoints) <= set(known):
        raise PlanError(
            f"Cannot load experts of the groups {sorted(set(checkpoints) - set(known))}; groups with experts are "
            f"{', '.join(known)}. Expert 0 is the base model's own and stays it."
        )
    for group, given in checkpoints.items():
        sources = [given] if isinstance(given, str | Path | Mapping) else list(given)
        readers = [source if isinstance(source, Mapping) else CheckpointReader(resolve(source)) for source in sources]
        pairs = [
            (parameter, *_found(name, parameter, readers[number if len(readers) > 1 else 0], tuner))
            for number, name, parameter in _parameters(tuner, group, len(readers))
        ]
        for parameter, reader, name in pairs:
            parameter.copy_(reader[name])


def _parameters(tuner: MoeDeltaTuner, group: str, sources: int) -> Iterator[tuple[int, str, nn.Parameter]]:
    """Number of an expert within its group, dense name and parameter of everything the group's experts hold."""
    adapter, plan = tuner.active_adapters[0], tuner.plan()
    for layer, name, module in tuner.expert_layers():
        experts = plan.experts_of(layer, group)
        if sources not in (1, len(experts)) and len(experts):
            raise PlanError(
                f"{sources} checkpoints are given for the group {group!r}, which has {len(experts)} experts in layer "
                f"{layer}. Give one checkpoint for all of them, or one each."
            )
        for number, expert in enumerate(module.experts(adapter)[e] for e in experts):
            if any(isinstance(part, LowRankLinear) for part in expert.modules()):
                raise PlanError(
                    "Low-rank experts cannot take the weights of a dense checkpoint, whose distance from the base is "
                    "of any rank. Use full experts (expert_rank=None)."
                )
            for key, parameter in expert.named_parameters():
                yield number, f"{name}.{key}", parameter


def _found(
    name: str, parameter: Tensor, reader: Mapping[str, Tensor], tuner: MoeDeltaTuner
) -> tuple[Mapping[str, Tensor], str]:
    """The checkpoint and the name it has for a tensor: checkpoints of a bare backbone leave the model's prefix out."""
    prefix = f"{tuner.model.base_model_prefix}."
    stored = name if name in reader else name.removeprefix(prefix)
    label = getattr(reader, "path", "The given checkpoint")
    if stored not in reader:
        raise CheckpointError(
            f"{label} has no {name}; it holds {first_few(reader)}. Experts need a dense checkpoint of the base model's "
            f"architecture ({tuner.model.config.model_type})."
        )
    shape = reader.shapes[stored] if isinstance(reader, CheckpointReader) else tuple(reader[stored].shape)
    if shape != tuple(parameter.shape):
        raise CheckpointError(
            f"{label} holds {stored} in shape {shape}, the base model has {tuple(parameter.shape)}. Experts need a "
            "dense checkpoint with the base model's sizes."
        )
    return reader, stored
