"""Is a graft doubtful? The size of the delta, and the cosine of it with what each expert learnt.

In: a delta, the base's weights and an adapter's tensors. Out: one row an expert, and warnings. Near a cosine of 0 the
two changes do not meet; well below, grafting undoes what the expert learnt. A graft asks a few rows of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GraftError
from ..tensors import Tensors, sampled_rows
from .adapter import Adapter
from .report import DeltaReport
from .stored import DeltaFile
from .weights import GraftedWeights

OPPOSED = -0.3
"""From here down an expert is called opposed to the delta; unrelated changes are within a few hundredths of 0."""


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
def expert_agreement(delta: DeltaFile, base: Mapping[str, Tensor], adapter: Adapter) -> tuple[ExpertAgreement, ...]:
    """Compare a delta with every expert of an adapter, one tensor at a time.

    Args:
        delta: of the base model that the adapter was trained on.
        base: its weights.
        adapter: the adapter.

    Raises:
        GraftError: the adapter has no experts, or they do not belong to this base.
    """
    if not any(block.experts for block in adapter.blocks):
        raise GraftError("The adapter has no experts (moe_delta_experts). Pass the folder that save_pretrained wrote.")

    def changes(name: str, key: str) -> tuple[Tensor, Tensor]:
        if name not in base or name not in delta.tensors:
            raise GraftError(f"The adapter's {key} has no {name} in base and delta. They belong to different models.")
        change = _change(key, base[name], adapter.tensors)
        own = delta.delta(name)
        if own.numel() != change.numel():
            raise GraftError(f"The adapter's {key} and the delta's {name} differ in size. They belong to other models.")
        return own, change

    return _agreement(adapter, changes)


@torch.no_grad()
def doubts(weights: GraftedWeights) -> tuple[str, ...]:
    """What makes a graft doubtful: what a few rows of every tensor tell, and what training has left doubtful."""
    base, after = weights.base, weights.post_trained.tensors
    names = [name for name in weights.names if name in base and after.meta(name).is_floating_point()]
    squares = []
    for name in names:
        start, end = base.sample(name).double(), after.sample(name).double()
        squares.append((name, float((end - start).square().sum()), float(start.square().sum())))
    report = DeltaReport.of(squares)
    found = list(report.doubtful)
    if not any(delta for _, delta, _ in squares) and not all(torch.equal(base[n], after[n]) for n in names):
        found = []  # post-training has changed rows that no sample holds

    def changes(name: str, key: str) -> tuple[Tensor, Tensor]:
        own, start = after.sample(name).double() - base.sample(name).double(), base.sample(name)
        return own, _sampled_change(key, start, weights.adapter.tensors, len(base.meta(name)))

    found += [row.doubt for row in _agreement(weights.adapter, changes) if row.doubt]
    return (*found, *weights.adapter.config.record.doubts)


def _agreement(adapter: Adapter, changes: Callable[[str, str], tuple[Tensor, Tensor]]) -> tuple[ExpertAgreement, ...]:
    """One row an expert, from `changes(dense weight, adapter's tensor)`: the delta, and the expert's own change."""
    sums: dict[int, Tensor] = {}
    lowest: dict[int, tuple[float, str]] = {}
    for _, expert, block, keys in adapter.experts():
        for inner, key in keys.items():
            if inner.endswith(".B"):
                continue
            name = f"{block.module}.{inner.removesuffix('.A') + '.weight' if inner.endswith('.A') else inner}"
            own, change = (part.double().flatten() for part in changes(name, key))
            products = torch.stack([own @ change, own @ own, change @ change])
            sums[expert] = sums.get(expert, torch.zeros(3, dtype=torch.float64, device=own.device)) + products
            lowest[expert] = min(lowest.get(expert, (2.0, "")), (_cosine(products), name))
    return tuple(ExpertAgreement(expert, _cosine(sums[expert]), *lowest[expert]) for expert in sorted(sums))


def _change(key: str, base: Tensor, adapter: Mapping[str, Tensor]) -> Tensor:
    """`E - W_0`, or `B A` of a low-rank expert."""
    if not key.endswith(".A"):
        return adapter[key].double() - base.double()
    change = adapter[key.removesuffix("A") + "B"].float() @ adapter[key].float()
    return change if change.shape == base.shape else change.T


def _sampled_change(key: str, start: Tensor, adapter: Tensors, rows: int) -> Tensor:
    """The same of the sampled rows of `W_0`, which has `rows` of them."""
    if not key.endswith(".A"):
        return adapter.sample(key).double() - start.double()
    A, other = adapter[key], key.removesuffix("A") + "B"
    if adapter.meta(other).shape[0] == rows and start.shape[1] == A.shape[1]:
        return adapter.sample(other).double() @ A.double()
    B = adapter[other]  # GPT-2 keeps its matrices as (in, out)
    return (B.double() @ A.double()).T[sampled_rows(rows)]


def _cosine(products: Tensor) -> float:
    """Of `(a.b, a.a, b.b)`; 0 if one is zero."""
    size = float((products[1] * products[2]).sqrt())
    return float(products[0]) / size if size else 0.0
