"""How much of the experts' own change to keep: the search behind `expert_scale="auto"`."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftModel

Validation = Callable[[PeftModel], float]
"""A score of a grafted model on held-out text and tasks; higher is better."""

EXPERT_SCALES = (0.25, 0.5, 0.75, 1.0)
"""What is tried first; then the middles beside the best of these."""


def search(score_at: Callable[[float], float]) -> list[tuple[float, float]]:
    """Score a coarse grid, then the middles on either side of its best: `(expert_scale, score)` in the order tried."""
    scores = {scale: score_at(scale) for scale in EXPERT_SCALES}
    best = max(scores, key=scores.__getitem__)
    grid = (0.0, *EXPERT_SCALES)
    for neighbour in (s for s in grid if abs(grid.index(s) - grid.index(best)) == 1):
        middle = (best + neighbour) / 2
        scores[middle] = score_at(middle)
    return list(scores.items())
