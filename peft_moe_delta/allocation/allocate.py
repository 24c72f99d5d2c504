"""`allocate_experts`: which layers get how many experts.

In: statistics of each layer, a strategy, a budget. Out: an `ExpertPlan`.

- `uniform`: the same everywhere (MoE-LPR, arXiv 2408.11396).
- `inverse_similarity`: `N_i` proportional to `1/S_i`, fewer experts where languages look alike (LayerMoE, 2505.22582).
  The budget is met exactly: shares are clipped to floor and ceiling, then rounded by largest remainder.
- `inverse_similarity_published`: LayerMoE's own rounding, `ceil(budget * (1/S_i) / sum_j 1/S_j)` experts a layer with
  expert 0 among them; their sum overshoots the budget (84 for 70 on 28 layers).
- `deviation_threshold`: every group has experts where the parameters want to move most, `z_l >= 0.6` of the min-max
  normalised mean deviation (DMoE, 2506.12388); or in the top layers; or in as many of those as a budget pays for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError, LanguageError, PlanError
from ..languages import ORIGINAL_GROUP, LanguageTable
from ..plan import ExpertPlan
from .statistics import LanguageStatistics

DEFAULT_GROUP = "expanded"
LEAST_SIMILARITY = 0.01
"""The least similarity counted, as a share of the largest: a mean cosine may be zero or negative, its inverse not."""

Statistics = LanguageStatistics | Mapping[str, ArrayLike] | ArrayLike


def allocate_experts(
    statistics: Statistics,
    strategy: str = "inverse_similarity",
    budget: int | None = None,
    *,
    languages: Mapping[str, str] | None = None,
    floor: int = 1,
    ceiling: int | None = None,
    threshold: float = 0.6,
    top_layers: int | None = None,
    experts_per_group: int = 1,
    max_params: int | None = None,
    layers: Sequence[int] | None = None,
) -> ExpertPlan:
    """Choose how many experts each group owns in each layer.

    Args:
        statistics: what `measure` wrote; or figures from elsewhere: one number a layer (similarity or deviation, as
            the strategy asks), or `{language: one number a layer}`, which is averaged over languages.
        strategy: `"uniform"`, `"inverse_similarity"`, `"inverse_similarity_published"` or `"deviation_threshold"`.
        budget: new experts over all layers and groups together, expert 0 not among them. Needed by
            `"inverse_similarity"`; `"uniform"` takes it or `experts_per_group`; with `"deviation_threshold"` the layers
            of largest deviation that it pays for get experts. For `"inverse_similarity_published"` it is the paper's
            delta, which counts expert 0.
        languages: code -> group, as in `MoeDeltaConfig`: the plan's groups and, with measured statistics, which
            languages are new and which original. Without it there is one group, `"expanded"`, of every language.
            Several groups get a layer's experts dealt in turn, going on in the next layer where this one stopped.
        floor, ceiling: fewest and most new experts a layer, for `"inverse_similarity"`.
        threshold: of `"deviation_threshold"`, from 0 to 1.
        top_layers: take this many layers of largest deviation instead of a threshold.
        experts_per_group: experts each group gets in a chosen layer, for `"uniform"` and `"deviation_threshold"`.
        max_params: trainable parameters that the plan may have at most, as `budget` for `"deviation_threshold"`; needs
            measured statistics, which know the size of an expert.
        layers: decoder layers that a table of numbers speaks of; the first ones by default.

    Raises:
        PlanError: an unknown strategy, or a budget that cannot be met.
        DataError: figures that are not one finite number a layer, or a statistic that was not measured.
        LanguageError: `languages` names one that was not measured, or there is no pair to compare.
    """
    if strategy not in STRATEGIES:
        raise PlanError(f"Unknown strategy {strategy!r}; expected one of: {', '.join(STRATEGIES)}.")
    table = None if languages is None else LanguageTable.build(languages)
    groups = (DEFAULT_GROUP,) if table is None else table.groups[1:]
    if not groups:
        raise PlanError('Every language is in the group "original", so there is nothing to allocate experts to.')
    for name, value, least in (("experts_per_group", experts_per_group, 1), ("floor", floor, 0)):
        if value < least:
            raise PlanError(f"{name}: got {value}, expected {least} or more.")
    figures, where, sizes = _figures(statistics, STRATEGIES[strategy], table, layers)
    if strategy == "deviation_threshold":
        if max_params is not None:
            budget = _affordable(max_params, len(groups) * experts_per_group, sizes)
        chosen = _deviating_layers(figures, threshold, top_layers, budget, len(groups) * experts_per_group)
        rows = [[experts_per_group * int(layer in chosen)] * len(groups) for layer in range(len(figures))]
    else:
        if strategy == "uniform":
            counts = _uniform(len(figures), len(groups), budget, experts_per_group)
        elif budget is None:
            raise PlanError(f"{strategy!r} needs a budget: the number of experts over all layers together.")
        elif strategy == "inverse_similarity":
            counts = largest_remainder(1 / _guarded(figures), budget, floor, ceiling)
        else:
            counts = [total - 1 for total in _published_totals(figures, budget)]
        rows = _dealt(counts, len(groups))
    columns = dict(zip(groups, zip(*rows, strict=True), strict=True))
    return ExpertPlan.build(where, (ORIGINAL_GROUP, *groups), columns).with_sizes(**sizes)


STRATEGIES: Mapping[str, str | None] = {
    "uniform": None,
    "inverse_similarity": "similarity",
    "inverse_similarity_published": "similarity",
    "deviation_threshold": "deviation",
}
"""Strategy -> the statistic it reads."""


def largest_remainder(weights: np.ndarray, total: int, floor: int, ceiling: int | None) -> list[int]:
    """Whole numbers that sum to `total`, each from `floor` to `ceiling`, proportional to `weights` where those allow.

    Shares `clip(c * weight, floor, ceiling)` sum to the total for one c; they are rounded down, and what is left goes
    to the largest remainders, the earlier of equals first. A larger weight never gets the smaller number.

    Raises:
        PlanError: no such numbers: the total is below all floors or above all ceilings.
    """
    most = total if ceiling is None else ceiling
    if not floor * len(weights) <= total <= most * len(weights) or floor > most:
        raise PlanError(
            f"budget: got {total} new experts, expected {floor * len(weights)} to {most * len(weights)} for "
            f"{len(weights)} layers of {floor} to {most} each. Change the budget, the floor or the ceiling."
        )
    low, high = 0.0, (most + 1) / float(weights.min())
    for _ in range(200):  # bisection to the last bit: the sum grows with c
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * weights, floor, most).sum() < total else (low, middle)
    shares = np.clip(high * weights, floor, most)
    counts = np.floor(shares + 1e-9).astype(int)  # a share that is whole but for its last bits is whole
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - shares[i], i))
    for index in order[: total - int(counts.sum())]:
        counts[index] += 1
    return counts.tolist()


def _published_totals(similarity: np.ndarray, delta: int) -> list[int]:
    """LayerMoE's experts a layer, expert 0 among them."""
    inverse = 1 / _guarded(similarity)
    return [math.ceil(share) for share in delta * inverse / inverse.sum()]


def _guarded(similarity: np.ndarray) -> np.ndarray:
    """Similarities that can be inverted: none below a hundredth of the largest."""
    if not similarity.max() > 0:
        raise PlanError(
            f"No layer has a positive similarity (the largest is {similarity.max():.3g}), so their inverses mean "
            'nothing. Check the measurement, or use "uniform" or "deviation_threshold".'
        )
    return np.maximum(similarity, LEAST_SIMILARITY * similarity.max())


def _uniform(num_layers: int, num_groups: int, budget: int | None, experts_per_group: int) -> list[int]:
    """The same number in every layer."""
    if budget is None:
        return [experts_per_group * num_groups] * num_layers
    if budget < num_layers or budget % num_layers:
        raise PlanError(
            f'budget: got {budget}, expected a multiple of {num_layers} layers for "uniform". Nearest: '
            f"{max(1, round(budget / num_layers)) * num_layers}."
        )
    return [budget // num_layers] * num_layers


def _deviating_layers(
    deviation: np.ndarray, threshold: float, top_layers: int | None, budget: int | None, experts_a_layer: int
) -> list[int]:
    """Positions of the layers that get experts."""
    if top_layers is not None and budget is not None:
        raise PlanError("Give top_layers or a budget, not both.")
    if budget is not None:
        top_layers = min(budget // experts_a_layer, len(deviation))
        if top_layers < 1:
            raise PlanError(
                f"budget: it pays for {budget} new experts, expected {experts_a_layer} or more: those of one layer."
            )
    if top_layers is not None:
        if not 1 <= top_layers <= len(deviation):
            raise PlanError(f"top_layers: got {top_layers}, expected 1 to {len(deviation)}.")
        return sorted(sorted(range(len(deviation)), key=lambda i: (-deviation[i], i))[:top_layers])
    if not 0 <= threshold <= 1:
        raise PlanError(f"threshold: got {threshold}, expected 0 to 1: deviations are min-max normalised.")
    spread = deviation.max() - deviation.min()
    if not spread > 0:
        raise PlanError(
            "All layers deviate alike, so min-max normalisation has nothing to tell them apart. Use top_layers or "
            '"uniform".'
        )
    return [i for i, z in enumerate((deviation - deviation.min()) / spread) if z >= threshold]


def _affordable(max_params: int, experts_a_layer: int, sizes: Mapping[str, int]) -> int:
    """The number of new experts, in whole layers, that a number of parameters pays for, router rows included."""
    if not sizes:
        raise PlanError("max_params needs statistics that `measure` wrote, which know an expert's size. Use budget.")
    a_layer = experts_a_layer * sizes["expert_params"] + (experts_a_layer + 1) * sizes["hidden_size"]
    if max_params < a_layer:
        raise PlanError(f"max_params: got {max_params:,}, expected {a_layer:,} or more: one layer's experts.")
    return max_params // a_layer * experts_a_layer


def _dealt(counts: Sequence[int], num_groups: int) -> list[list[int]]:
    """Each layer's experts dealt to the groups in turn, going on where the layer before stopped."""
    rows, turn = [], 0
    for count in counts:
        row = [count // num_groups] * num_groups
        for extra in range(count % num_groups):
            row[(turn + extra) % num_groups] += 1
        turn += count
        rows.append(row)
    return rows


def _figures(
    statistics: Statistics, wanted: str | None, table: LanguageTable | None, layers: Sequence[int] | None
) -> tuple[np.ndarray, Sequence[int], dict[str, int]]:
    """The figure of each layer, the layers' indices, and an expert's sizes where they are known."""
    if isinstance(statistics, LanguageStatistics):
        if layers is not None:
            raise PlanError("layers: measured statistics know their own. Leave it out.")
        codes = statistics.languages if table is None else table.codes
        original = () if table is None else table.members(ORIGINAL_GROUP)
        if wanted == "similarity":
            figures = statistics.similarity([code for code in codes if code not in original], original)
        elif wanted == "deviation":
            figures = np.mean(list(_named(statistics.deviation(), table).values()), axis=0)
        else:
            figures = np.ones(len(statistics.layers))
        sizes = {name: statistics.model[name] for name in ("expert_params", "hidden_size") if name in statistics.model}
        return figures, statistics.layers, sizes
    figures = _table(_named(statistics, table) if isinstance(statistics, Mapping) else statistics)
    where = range(len(figures)) if layers is None else layers
    if len(where) != len(figures):
        raise PlanError(f"statistics speak of {len(figures)} layers, but {len(where)} are named. They must agree.")
    return figures, where, {}


def _named(rows: Mapping[str, Any], table: LanguageTable | None) -> dict[str, Any]:
    """The rows of the languages that a plan is for: what else was measured has no say.

    Raises:
        LanguageError: a new language was not measured.
    """
    if table is None:
        return dict(rows)
    original = table.members(ORIGINAL_GROUP)
    if unknown := [code for code in table.codes if code not in rows and code not in original]:
        raise LanguageError(f"{unknown} were not measured; the statistics have {', '.join(rows)}.")
    return {code: rows[code] for code in table.codes if code in rows}


def _table(statistics: Any) -> np.ndarray:
    """One number a layer out of figures from elsewhere."""
    rows = list(statistics.values()) if isinstance(statistics, Mapping) else [statistics]
    lengths = {np.size(row) for row in rows}
    if len(lengths) > 1:
        raise DataError(f"statistics: got rows of {sorted(lengths)} layers, expected all of one model: equal lengths.")
    try:
        table = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"statistics: {error}. Expected one number a layer, or that for each language.") from error
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise DataError(
            f"statistics: got figures of shape {table.shape[1:]}, expected one finite number a layer, (layers,), or "
            "that for each language."
        )
    return np.asarray(table.mean(axis=0))
