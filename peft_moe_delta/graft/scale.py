"""How much of a post-training delta to add: one number, or one for each kind of tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import GraftError


@dataclass(frozen=True)
class Scale:
    """A number for every tensor name.

    Attributes:
        value: a finite number for all; or `{pattern: number}`, regular expressions searched for in the name, the first
            that is found counts and a name without any has 1. Example: `{"self_attn": 0.5, r"layers\\.0\\.": 0.0}`.

    Raises:
        GraftError: a number is not finite, or a pattern is no regular expression.
    """

    value: float | Mapping[str, float] = 1.0

    def __post_init__(self) -> None:
        numbers = self.value.values() if isinstance(self.value, Mapping) else [self.value]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise GraftError(
                f"scale must be a finite number, or {{pattern: finite number}} over tensor names; got {self.value!r}."
            )
        for pattern in self.value if isinstance(self.value, Mapping) else ():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise GraftError(
                    f"scale pattern {pattern!r} is no regular expression: {error}. "
                    r'It is searched for in tensor names: "mlp", r"layers\.(0|1)\.", "norm".'
                ) from error

    def of(self, name: str) -> float:
        """The scale of a tensor."""
        if not isinstance(self.value, Mapping):
            return self.value
        return next((number for pattern, number in self.value.items() if re.search(pattern, name)), 1.0)


def scale_of_groups(groups: Sequence[str], expert_scale: float | Mapping[str, float] | str) -> dict[str, float]:
    """One finite expert scale for every group that owns experts; 1 for those that a mapping leaves out.

    Raises:
        GraftError: not a number, or a mapping with other groups.
    """
    given = dict(expert_scale) if isinstance(expert_scale, Mapping) else dict.fromkeys(groups, expert_scale)
    numbers = all(isinstance(a, int | float) and math.isfinite(a) for a in given.values())
    if not numbers or not set(given) <= set(groups):
        raise GraftError(
            f'expert_scale must be a finite number, {{group: number}} over {", ".join(groups)}, or "auto"; got '
            f"{expert_scale!r}."
        )
    return {group: float(given.get(group, 1.0)) for group in groups}
