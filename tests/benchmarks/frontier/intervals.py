"""How sure a figure is that was measured on some documents with some random seeds.

In: the figure of each seed, and its bootstrap replicates over documents, the same documents drawn for all seeds and all
methods. Out: an interval for the mean over seeds. Three seeds are too few to be resampled: a percentile bootstrap over
seeds and documents covers 95% far less often than it says (tests/test_frontier.py prints how often). So documents are
bootstrapped, and both sources of variance go into Student's t:

    variance = bootstrap variance over documents + variance of the seeds' figures / seeds

with Cochran and Cox's mean of the two quantiles. (Welch and Satterthwaite's degrees of freedom cover less: where three
seeds happen to agree, they forget how few there are.) What seeds and documents do together is counted twice, which errs
on the wide side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from peft_moe_delta.evaluation.bootstrap import Interval

RESAMPLES = 400


def document_weights(documents: int, resamples: int, seed: int) -> np.ndarray:
    """How often each document is drawn, (resamples + 1, documents); the first row is the sample itself."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    return np.concatenate([np.ones((1, documents), dtype=np.int64), drawn])


def interval(figures: np.ndarray, documents: int, confidence: float = 0.95) -> Interval:
    """The mean over seeds of a figure.

    Args:
        figures: (1 + resamples, seeds); the first row is of the sample itself.
        documents: of the smallest set that the figure rests on.
    """
    values, replicates = figures[0], figures[1:].mean(axis=1)
    by_documents = replicates.var(ddof=1) * documents / max(1, documents - 1)  # the bootstrap's own bias
    by_seeds = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    t = _t((by_documents, by_seeds), (documents - 1, len(values) - 1), confidence)
    half = t * (by_documents + by_seeds) ** 0.5
    mean = float(values.mean())
    return Interval(mean, mean - float(half), mean + float(half))


def _t(variances: Sequence[float], freedoms: Sequence[int], confidence: float) -> float:
    """Student's t for a sum of estimated variances: the mean of their own, weighted by variance."""
    parts = [(v, float(stats.t.ppf((1 + confidence) / 2, df))) for v, df in zip(variances, freedoms, strict=True) if v]
    return sum(v * t for v, t in parts) / sum(v for v, _ in parts) if parts else 0.0


def percentile_interval(figures: np.ndarray, seed: int = 0, confidence: float = 0.95) -> Interval:
    """To compare with: seeds resampled like documents, and quantiles of the means."""
    rng = np.random.default_rng(seed)
    seeds = figures.shape[1]
    drawn = rng.integers(seeds, size=(len(figures) - 1, seeds))
    means = np.take_along_axis(figures[1:], drawn, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(figures[0].mean()), float(low), float(high))
