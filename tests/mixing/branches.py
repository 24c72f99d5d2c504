"""A seed and its branches on disk: pico models whose weights were moved apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from builders import perturbed, pico

EXPERT_PARTS = {
    None: (".mlp.",),
    "shared_kv": (".mlp.", "q_proj", "o_proj", "q_norm"),
    "full": (".mlp.", ".self_attn."),
}
"""Attention experts -> parts of parameter names that an expert holds."""


def branch_of(seed: nn.Module, number: int, parts: tuple[str, ...] = ("",)) -> nn.Module:
    """A copy of the seed that was trained in the weights whose names contain one of `parts`."""
    branch, before = perturbed(seed, seed=number, scale=0.5), dict(seed.named_parameters())
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            if not any(part in name for part in parts):
                parameter.copy_(before[name])
    return branch


def write_branches(folder: Path, family: str = "llama", parts: tuple[str, ...] = ("",)) -> dict[str, Path]:
    """Folders of `"seed"` and of the branches `"uralic"` and `"turkic"`, by name."""
    seed = pico(family)
    models = {"seed": seed, "uralic": branch_of(seed, 21, parts), "turkic": branch_of(seed, 22, parts)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}
