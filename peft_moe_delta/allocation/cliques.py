"""The tightest group: so many items of the smallest diameter.

In: a matrix of distances. Out: ascending indices. A set of diameter D is a clique of the graph that joins what is at
most D apart, so the smallest diameter is found by bisection over the distances there are, a clique search each.
"""

from __future__ import annotations

import numpy as np

EXACT_UP_TO = 20
"""How many items are searched exactly by default: fractions of a second; the search grows exponentially."""


def tightest(distance: np.ndarray, size: int, exact_up_to: int = EXACT_UP_TO) -> list[int]:
    """Indices of `size` items of the smallest diameter, the first such set in lexicographic order.

    Of more than `exact_up_to` items a greedy one: the closest pair, then always the item whose farthest member is
    nearest.
    """
    if size >= len(distance):
        return list(range(len(distance)))
    if size == 1:
        return [0]
    if len(distance) > exact_up_to:
        return _grown(distance, size)
    radii = np.unique(distance[np.triu_indices(len(distance), 1)])
    low, high = 0, len(radii) - 1  # radii[high] always holds a clique: the largest joins everything
    while low < high:
        middle = (low + high) // 2
        if _first_clique(_neighbours(distance, radii[middle]), size) is None:
            low = middle + 1
        else:
            high = middle
    found = _first_clique(_neighbours(distance, radii[high]), size)
    assert found is not None
    return found


def _neighbours(distance: np.ndarray, radius: float) -> list[int]:
    """For each item a bit set of the later items within the radius."""
    return [sum(1 << int(j) for j in np.flatnonzero(row[i + 1 :] <= radius) + i + 1) for i, row in enumerate(distance)]


def _first_clique(neighbours: list[int], size: int) -> list[int] | None:
    """The lexicographically first clique, or None."""

    def extended(clique: list[int], candidates: int) -> list[int] | None:
        if len(clique) == size:
            return clique
        while len(clique) + candidates.bit_count() >= size:
            item = (candidates & -candidates).bit_length() - 1
            candidates &= candidates - 1
            if found := extended([*clique, item], candidates & neighbours[item]):
                return found
        return None

    return extended([], (1 << len(neighbours)) - 1)


def _grown(distance: np.ndarray, size: int) -> list[int]:
    """The greedy set."""
    apart = distance.copy()
    np.fill_diagonal(apart, np.inf)
    group = [int(index) for index in np.unravel_index(apart.argmin(), apart.shape)]
    farthest = apart[group].max(axis=0)
    while len(group) < size:
        item = int(farthest.argmin())
        group.append(item)
        farthest = np.maximum(farthest, apart[item])
    return sorted(group)
