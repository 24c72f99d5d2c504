"""Whether the value of a configuration's field is of the type that is written beside it.

In: a value and a type, as `get_type_hints` gives it. Out: yes or no, and the type in words for an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type: numbers are no booleans, and a tuple or PEFT's own set will do for a list."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if origin is list:
        listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
        return listed and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def in_words(hint: Any) -> str:
    """A type as one would write it: `list[int] | None`."""
    words = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return words.replace("typing.", "").replace("peft_moe_delta.plan.", "")
