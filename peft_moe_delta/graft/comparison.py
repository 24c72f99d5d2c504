"""The last step of exporting, in memory and from files: what was made computes what the adapter computes.

In: the adapter and its export in fp32, where equality is a matter of the method; for an export that ships in 16 bits,
that one too. Out: the figures of a `GraftReport`.
"""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from ..export import UpcycledWeights, check_equal_logits
from ..export.gate import check_finite_logits
from ..tuner import MoeDeltaTuner
from ..tuner.agreement import mean_route_agreement


def compare_export(
    weights: UpcycledWeights,
    exact: PeftModel,
    exported: PreTrainedModel,
    *,
    language: str | None = None,
    tolerance: float = 1e-4,
) -> float:
    """Refuse an export that is not the adapter.

    Args:
        weights: what was exported.
        exact, exported: both in fp32.
        language: what the export is for; None for all languages.
        tolerance: largest difference of logits allowed.

    Returns:
        The largest difference of logits.

    Raises:
        GraftError: it exceeds `tolerance`.
    """
    with cast("MoeDeltaTuner", exact.base_model).in_language(language):
        told = check_equal_logits(exact, exported, languages=_languages(weights), tolerance=tolerance)
        read = 0.0 if weights.identifier is None else check_equal_logits(exact, exported, tolerance=tolerance)
    return max(told, read)


def rounded_routes(weights: UpcycledWeights, adapter: PeftModel, exported: PreTrainedModel) -> float | None:
    """Share of random tokens that a 16-bit export sends to the adapter's experts, averaged over layers.

    None where it has no routes, or is one group's: its experts have other numbers then.

    Raises:
        GraftError: the export overflows in its dtype.
    """
    check_finite_logits(exported, languages=_languages(weights))
    if not weights.moe_layers or weights.group is not None:
        return None
    return mean_route_agreement(adapter, exported, _languages(weights))


def _languages(weights: UpcycledWeights) -> int | None:
    return None if weights.languages is None else len(weights.languages.codes)
