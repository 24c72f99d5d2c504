"""From points to frontiers: the most that a method gains where it keeps so much.

In: of every point `(a, s)` what is kept, r, and what is gained, x, both beside the post-trained model and both better
the higher; which points are on the frontier is decided on validation text. Out: the gain at a level of retention, its
mean over a range of levels (the area under the frontier), and the mirror image.

All arrays lead with replicates R, so that a bootstrap is one call: r_RP and x_RP, with P points.
"""

from __future__ import annotations

import numpy as np

LEVELS = 21  # at which a range is averaged


def frontier(r_P: np.ndarray, x_P: np.ndarray) -> np.ndarray:
    """Points that no other beats in both, in the order of falling r: where a user may choose, on validation text."""
    order = sorted(range(len(r_P)), key=lambda i: (-r_P[i], -x_P[i]))
    kept: list[int] = []
    for i in order:
        if not kept or x_P[i] > x_P[kept[-1]]:
            kept.append(i)
    return np.array(kept)


def gain_at(r_RP: np.ndarray, x_RP: np.ndarray, level: float) -> np.ndarray:
    """The most gained along the polyline of points where at least `level` is kept, (R,); NaN where it never is."""
    reached = np.where(r_RP >= level, x_RP, -np.inf)
    r_0, r_1, x_0, x_1 = r_RP[:, :-1], r_RP[:, 1:], x_RP[:, :-1], x_RP[:, 1:]
    crosses = (r_0 - level) * (r_1 - level) < 0
    share = np.divide(r_0 - level, r_0 - r_1, out=np.zeros_like(r_0), where=crosses)
    between = np.where(crosses, x_0 + share * (x_1 - x_0), -np.inf)
    best = np.concatenate([reached, between], axis=1).max(axis=1)
    return np.where(np.isfinite(best), best, np.nan)


def area(r_RP: np.ndarray, x_RP: np.ndarray, low: float, high: float = 0.0) -> np.ndarray:
    """The mean gain over levels of retention from `low` to `high`, (R,)."""
    return np.mean([gain_at(r_RP, x_RP, level) for level in np.linspace(low, high, LEVELS)], axis=0)
