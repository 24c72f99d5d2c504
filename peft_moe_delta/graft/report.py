"""What a post-training delta amounts to, part by part, and what a graft says of itself.

In: the norms of deltas and weights; a graft. Out: frozen rows that `dataclasses.asdict` turns into JSON.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DOUBTFUL_RATIO = 0.5
"""From here on `||Delta|| / ||W||` is called doubtful: two unrelated models of equal norm are at sqrt(2)."""
EQUAL = "the two checkpoints are equal: there is nothing to graft"

_FAMILIES = {
    "norm": r"norm|\bln_",
    "embeddings": r"embed|lm_head|\bwte\b|\bwpe\b",
    "self_attn": r"attn|attention",
    "mlp": r"mlp|ffn|feed_forward",
}


def family_of(name: str) -> str:
    """The part of a model that a tensor belongs to: norm, embeddings, self_attn, mlp or other."""
    return next((family for family, pattern in _FAMILIES.items() if re.search(pattern, name)), "other")


@dataclass(frozen=True)
class FamilyDelta:
    """The delta of one part of the model, over all its tensors.

    Attributes:
        family: see `family_of`.
        delta_norm: `||Delta||`, fp64.
        weight_norm: `||W_0||`, fp64.
        error_norm: `||stored - Delta||` of a stored delta, fp64.
    """

    family: str
    delta_norm: float
    weight_norm: float
    error_norm: float = 0.0

    @property
    def ratio(self) -> float:
        """`||Delta|| / ||W_0||`; infinite where zeros were changed, 0 where they were not."""
        if self.weight_norm == 0:
            return float("inf") if self.delta_norm else 0.0
        return self.delta_norm / self.weight_norm

    @property
    def error(self) -> float:
        """`||stored - Delta|| / ||Delta||`; 0 where nothing was changed."""
        return self.error_norm / self.delta_norm if self.delta_norm else 0.0


@dataclass(frozen=True)
class DeltaReport:
    """Size of a delta by part of the model.

    Attributes:
        families: one row a part, in order of appearance.
        doubtful: reasons to doubt that grafting makes sense; empty if there is none.
    """

    families: tuple[FamilyDelta, ...]
    doubtful: tuple[str, ...]

    @classmethod
    def of(cls, squares: Iterable[tuple[str, float, float]], errors: Mapping[str, float] | None = None) -> DeltaReport:
        """Sum up `(tensor name, ||Delta||^2, ||W_0||^2)` and the `||stored - Delta||^2` of a stored one by name."""
        sums: dict[str, list[float]] = {}
        for name, delta, weight in squares:
            row = sums.setdefault(family_of(name), [0.0, 0.0, 0.0])
            row[0] += delta
            row[1] += weight
            row[2] += (errors or {}).get(name, 0.0)
        rows = tuple(FamilyDelta(family, *(square**0.5 for square in row)) for family, row in sums.items())
        doubtful = [
            f"{row.family}: the change is {row.ratio:.0%} of the weights' norm; unrelated models are at about 141%, so "
            "the post-trained checkpoint may not descend from this base"
            for row in rows
            if row.ratio >= DOUBTFUL_RATIO
        ]
        if not any(row.delta_norm for row in rows):
            doubtful.append(EQUAL)
        return cls(rows, tuple(doubtful))


@dataclass(frozen=True)
class GraftReport:
    """What was grafted and how: `graft_report` of a result, and `graft` in a grafted adapter's config.

    Attributes:
        post_trained: name or path of the post-trained model.
        scale: share of the post-training delta, a number or one a name pattern.
        expert_scale: share of each group's own change that was kept.
        trials: `(expert_scale, score)` of every trial of `"auto"`, in order.
        layout: name of the stock architecture; None for an adapter.
        language: the language a dense export was made for; None otherwise.
        max_logit_difference: largest fp32 logit difference between export and grafted adapter; None for an adapter.
        choice: why that architecture, in one line; None for an adapter.
        replicated_bytes: what copies of the experts of dense layers added to the export.
        route_agreement: share of routes on which a 16-bit export and the adapter agree; None where not measured.
        new_tokens: tokens learnt in expansion, which stand behind the post-trained tokenizer's own.
        first_new_token_id: id of the first of them; None without any.
        warnings: what makes the result doubtful; empty where nothing does.
        calibration: what `calibrate_routers` found, where the grafted adapter went through it.
    """

    post_trained: str
    scale: float | Mapping[str, float]
    expert_scale: dict[str, float]
    trials: tuple[tuple[float, float], ...] = ()
    layout: str | None = None
    language: str | None = None
    max_logit_difference: float | None = None
    choice: str | None = None
    replicated_bytes: int = 0
    route_agreement: float | None = None
    new_tokens: tuple[str, ...] = ()
    first_new_token_id: int | None = None
    warnings: tuple[str, ...] = ()
    calibration: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        """What came out, why, how exactly, and the first reason for doubt."""
        scales = f"scale={reprlib.repr(self.scale)}, expert_scale={reprlib.repr(self.expert_scale)}"
        lines = [f"GraftReport of {self.post_trained} as {self.layout or 'an adapter'}, {scales}"]
        if self.choice is not None:
            lines.append(self.choice)
        if self.max_logit_difference is not None:
            lines.append(f"largest logit difference to the adapter: {self.max_logit_difference:.1g}")
        if self.route_agreement is not None:
            lines.append(f"routes that agree with the adapter's: {self.route_agreement:.1%}")
        if self.warnings:
            more = f" ({len(self.warnings) - 1} more in .warnings)" if len(self.warnings) > 1 else ""
            lines.append(f"doubtful: {self.warnings[0]}{more}")
        return "\n  ".join(lines)
