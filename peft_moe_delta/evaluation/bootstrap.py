"""How sure a score is: percentile bootstrap intervals over items, and of two models' difference on the same items.

In: one number an item (bits of a document, 0 or 1 of a task), and a weight an item (bytes) for a ratio of sums. Out:
the score with its interval. To compare two models, the *same* items are resampled for both: what makes a document hard
is then no noise, and the interval is the narrower for it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError

_BLOCK = 4_000_000  # indices drawn at a time: bounded memory, whatever the number of items


class Interval(NamedTuple):
    """A value, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    numerator: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of `sum(numerator) / sum(denominator)`, or of the mean where there is no denominator."""
    items, weights = _columns(denominator, numerator=numerator)
    return _interval(lambda index: _ratio(items, weights, index), len(items), confidence, resamples, seed)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the score of `a` minus the score of `b`, two models on the same items."""
    first, second, weights = _columns(denominator, a=a, b=b)
    return _interval(lambda index: _ratio(first - second, weights, index), len(first), confidence, resamples, seed)


def _columns(denominator: ArrayLike | None, **named: ArrayLike) -> list[np.ndarray]:
    """The named columns and the weights (ones by default) as fp64, checked to describe the same items."""
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in named.items()}
    first = next(iter(columns.values()))
    columns["denominator"] = np.ones_like(first) if denominator is None else np.asarray(denominator, dtype=np.float64)
    shapes = {name: column.shape for name, column in columns.items()}
    if first.ndim != 1 or first.size == 0 or len(set(shapes.values())) > 1:
        raise DataError(f"bootstrap: got the shapes {shapes}, expected equal ones, (items,). Pass one number an item.")
    if not (columns["denominator"] > 0).all():
        raise DataError("bootstrap: got a denominator of 0 or less, expected positive weights. Drop those items.")
    return list(columns.values())


def _ratio(items: np.ndarray, weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    return items[index].sum(axis=-1) / weights[index].sum(axis=-1)


def _interval(
    statistic: Callable[[np.ndarray], np.ndarray], items: int, confidence: float, resamples: int, seed: int
) -> Interval:
    """`statistic` maps indices of items (..., items) to values (...)."""
    if not 0 < confidence < 1 or resamples < 1:
        raise DataError(
            f"bootstrap: got confidence {confidence} and {resamples} resamples, expected a share between 0 and 1 and "
            "at least one resample. 0.95 and 2000 are usual."
        )
    values = np.concatenate([statistic(index) for index in _resampled(items, resamples, seed)])
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(np.arange(items))), float(low), float(high))


def _resampled(items: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of items drawn with replacement, (resamples, items) in all, in blocks."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // items)
    for start in range(0, resamples, rows):
        yield rng.integers(items, size=(min(rows, resamples - start), items))
