"""Do post-training and expansion pull the same way? The cosine of the delta with each expert's own change.

In: a stored delta, the base's weights and an adapter's tensors. Out: one row an expert. Near 0 the two changes do not
meet; well below, grafting undoes what the expert learnt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GraftError
from .stored import DeltaFile

OPPOSED = -0.3
"""From here down an expert is called opposed to the delta; unrelated changes are within a few hundredths of 0."""

_EXPERT = re.compile(r"(?:base_model\.model\.)?(?P<mlp>.+)\.moe_delta_experts\.(?P<expert>\d+)\.(?P<name>.+)")


@dataclass(frozen=True)
class ExpertAgreement:
    """One new expert, over all its layers.

    Attributes:
        expert: its number, 1 for the first.
        cosine: of `Delta` and `E - W_0` over all its matrices.
        lowest: the lowest cosine of a single tensor.
        tensor: that tensor.
    """

    expert: int
    cosine: float
    lowest: float
    tensor: str

    @property
    def doubt(self) -> str | None:
        """Why grafting is doubtful; None if it is not."""
        if self.cosine > OPPOSED:
            return None
        return (
            f"expert {self.expert}: its own change and the delta are opposed (cosine {self.cosine:.2f}), so the graft "
            "undoes part of what it learnt"
        )


@torch.no_grad()
def expert_agreement(
    delta: DeltaFile, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]
) -> tuple[ExpertAgreement, ...]:
    """Compare a delta with every expert of an adapter, one tensor at a time.

    Args:
        delta: of the base model that the adapter was trained on.
        base: its weights.
        adapter: the tensors of `adapter_model.safetensors`.

    Raises:
        GraftError: the adapter has no experts, or they do not belong to this base.
    """
    sums: dict[int, Tensor] = {}
    lowest: dict[int, tuple[float, str]] = {}
    for key in adapter:
        match = _EXPERT.fullmatch(key)
        if match is None or match["name"].endswith(".B"):
            continue
        owner, expert = match["mlp"], int(match["expert"]) + 1
        name = f"{owner}.{match['name'].removesuffix('.A') + '.weight' if key.endswith('.A') else match['name']}"
        if name not in base or name not in delta.tensors:
            raise GraftError(f"The adapter's {key} has no {name} in base and delta. They belong to different models.")
        change = _change(key, base[name], adapter).double().flatten()
        own = delta.delta(name).double().flatten()
        if len(own) != len(change):
            raise GraftError(f"The adapter's {key} and the delta's {name} differ in size. They belong to other models.")
        products = torch.stack([own @ change, own @ own, change @ change])
        sums[expert] = sums.get(expert, torch.zeros(3, dtype=torch.float64)) + products
        lowest[expert] = min(lowest.get(expert, (2.0, "")), (_cosine(products), name))
    if not sums:
        raise GraftError("The adapter has no experts (moe_delta_experts). Pass the folder that save_pretrained wrote.")
    return tuple(ExpertAgreement(expert, _cosine(sums[expert]), *lowest[expert]) for expert in sorted(sums))


def _change(key: str, base: Tensor, adapter: Mapping[str, Tensor]) -> Tensor:
    """`E - W_0`, or `B A` of a low-rank expert."""
    if not key.endswith(".A"):
        return adapter[key].double() - base.double()
    change = adapter[key.removesuffix("A") + "B"].float() @ adapter[key].float()
    return change if change.shape == base.shape else change.T


def _cosine(products: Tensor) -> float:
    """Of `(a.b, a.a, b.b)`; 0 if one is zero."""
    size = float((products[1] * products[2]).sqrt())
    return float(products[0]) / size if size else 0.0
