"""Growth: which experts a group may reach that was there before others came.

In: how many experts each group owns and the growth step that brought it. Out: a table to lay over a routing's own. A
group reaches the experts that existed when it was trained; those of later steps only once a review has opened them, so
that adding languages changes nothing for the others.
"""

from __future__ import annotations

Table = tuple[tuple[bool, ...], ...]


def within_reach(allowed: Table, counts: tuple[int, ...], steps: tuple[int, ...], open_steps: int) -> Table:
    """What a routing allows each group, without the experts that came after it and are not open yet.

    Args:
        allowed: (G, E) booleans of the routing's own rule.
        counts: experts each group owns in the layer.
        steps: the step that brought each group: 0 for those the adapter began with, then 1, 2, ...
        open_steps: experts of steps up to this one are open to everyone.

    Returns:
        (G, E) booleans. Row 0, the original languages', is also that of tokens whose language is not known.
    """
    came_with = [step for step, count in zip(steps, counts, strict=True) for _ in range(count)]
    return tuple(
        tuple(may and came <= max(step, open_steps) for may, came in zip(row, came_with, strict=True))
        for row, step in zip(allowed, steps, strict=True)
    )
