"""What has changed between two runs, in words.

In: what a step read then, and reads now, as flat mappings. Out: a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 3


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is read now and was not then, or the other way round."""
    absent = object()
    found = []
    for name in {**before, **now}:
        old, new = before.get(name, absent), now.get(name, absent)
        if old == new:
            continue
        if old is absent or new is absent:
            found.append(f"{name} is {'new' if old is absent else 'gone'}")
        elif str(new).startswith("step:"):
            found.append(f"{name} is another")
        elif str(new).startswith("sha256:"):
            found.append(f"the content of {name} has changed")
        else:
            found.append(f"{name} was {old} and is {new}")
    return found


def listed(reasons: Sequence[str]) -> str:
    """The first reasons, and how many more there are."""
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return "; ".join(reasons[:_SHOWN]) + more
