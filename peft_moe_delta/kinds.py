"""Values of the kind that an annotation says: the one check of recipes, growth files, `MoeDeltaConfig` and its record.

In: an annotation, with bounds where it is `Annotated[int, Within(1)]`, and a value that a user gave. Out: the value, or
an error that says where it stands, what was expected and what was got.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .errors import RecipeError


@dataclass(frozen=True)
class Within:
    """Bounds of a number, which is finite in any case."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, number: float) -> bool:
        return abs(number) <= sys.float_info.max and self.low <= number <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f" from {_plainly(self.low)} to {_plainly(self.high)}"
        return f" of at least {_plainly(self.low)}" if self.low > -math.inf else ""


def _plainly(bound: float) -> str:
    return f"{bound:.0f}" if bound == round(bound) else f"{bound:g}"


class Switch:
    """Marks a section that `true` asks for with its defaults, and `false` leaves out."""


Count = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]
Finite = Annotated[float, Within()]
NotNegative = Annotated[float, Within(0)]

_NAMES: Mapping[Any, str] = {
    int: "a whole number", float: "a finite number", str: "text that is not empty", bool: "true or false",
    dict: "a section", list: "a list", tuple: "a list",
}  # fmt: skip


def read_fields(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`: a dataclass, a plain type, or a list or mapping of those, as a field's annotation says it.

    Raises:
        RecipeError: a field is unknown, missing, of another kind or out of bounds; the message names it.
    """
    bounds = Within()
    if typing.get_origin(kind) is Annotated:
        kind, mark = typing.get_args(kind)
        bounds = mark if isinstance(mark, Within) else bounds
        if isinstance(mark, Switch) and isinstance(data, bool):
            data = {} if data else None
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return data if type(data) is kind else _read_section(kind, data, where)
    if origin is Literal:
        return _read_choice(arguments, data, where)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        kinds = [k for k in arguments if k is not type(None)]
        fitting = [k for k in kinds if _fits(k, data)]
        if len(kinds) > 1 and not fitting:
            raise RecipeError(f"{where} must be {' or '.join(map(_name, kinds))}; got {reprlib.repr(data)}.")
        return read_fields(fitting[0] if fitting else kinds[0], data, where)
    if not _fits(kind, data) or (origin in (int, float) and data not in bounds):
        raise RecipeError(f"{where} must be {_name(kind)}{bounds}; got {reprlib.repr(data)}.")
    if origin is dict:
        return {key: read_fields(arguments[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin in (list, tuple):
        return origin(read_fields(arguments[0], value, f"{where}[{index}]") for index, value in enumerate(data))
    return float(data) if kind is float else data


def did_you_mean(words: Iterable[Any], known: Iterable[str]) -> str:
    """ " Did you mean steps?", where something known is spelt nearly like a word; nothing otherwise."""
    names = list(known)
    near = [name for word in words for name in difflib.get_close_matches(str(word), names, n=1)]
    return f" Did you mean {' and '.join(dict.fromkeys(near))}?" if near else ""


def _read_choice(choices: Sequence[str], data: Any, where: str) -> str:
    if data not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise RecipeError(f"{where} must be {expected}; got {reprlib.repr(data)}.{did_you_mean([data], choices)}")
    return str(data)


def bytes_of(size: int | str) -> int:
    """`"5GB"` -> 5,000,000,000; 0 for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0


def size_text(size: float) -> str:
    """5,000,000,000 -> `"5.0 GB"`; MB and kB for what is smaller."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _read_section(kind: Any, data: Any, where: str) -> Any:
    """A dataclass from a mapping with its fields."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a section with fields; got {reprlib.repr(data)}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(data))
    if unknown or missing:
        wrong = [f"{what} fields {names}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise RecipeError(
            f"{where}: {', '.join(wrong)}.{did_you_mean(unknown, fields)} Known fields: {', '.join(fields)}."
        )
    hints = typing.get_type_hints(kind, include_extras=True)
    return kind(**{name: read_fields(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def _plain(kind: Any) -> Any:
    """The type itself: without bounds, without what a list or mapping holds."""
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return typing.get_origin(kind) or kind


def _name(kind: Any) -> str:
    plain = _plain(kind)
    return _NAMES.get(plain, "a section with fields" if dataclasses.is_dataclass(plain) else str(plain))


def _fits(kind: Any, data: Any) -> bool:
    """Whether a YAML value can be read as a kind."""
    plain = _plain(kind)
    if plain is Any:
        return True
    if dataclasses.is_dataclass(plain):
        return isinstance(data, Mapping | plain)
    if plain in (int, float):
        return isinstance(data, int if plain is int else int | float) and not isinstance(data, bool)
    if plain in (list, tuple):
        return isinstance(data, Sequence | Set) and not isinstance(data, str)
    return isinstance(data, plain) and data != ""
