"""What a graft says of itself: `graft_report` of its result, and `graft` in a grafted adapter's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MoeDeltaConfig


@dataclass(frozen=True)
class GraftReport:
    """What was grafted and how.

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
        warnings: why the result is doubtful, one reason each; they are warned of, and the card repeats them.
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


def new_tokens_of(config: MoeDeltaConfig) -> dict[str, Any]:
    """What a report says of them."""
    return {"new_tokens": tuple(config.new_tokens or ()), "first_new_token_id": config.first_new_token_id}
