"""Files of settings: YAML in, frozen dataclasses out. The one reader of recipes, growth files and `--config`.

The YAML is 1.2 (its core schema), where PyYAML alone reads 1.1: `no`, `on` and `2026-01-01` are text, `1e-3` is a
number, `012` is twelve. A key is the text that is written, so that the language `no` is no truth value, and a key that
comes twice is an error, of which PyYAML would drop the first.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from ..errors import RecipeError


@dataclass(frozen=True)
class Within:
    """Bounds of a number, which is finite in any case."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, number: float) -> bool:
        return math.isfinite(number) and self.low <= number <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f" from {self.low:g} to {self.high:g}"
        return f" of at least {self.low:g}" if self.low > -math.inf else ""


Count = Annotated[int, Within(1)]
Finite = Annotated[float, Within()]
NotNegative = Annotated[float, Within(0)]

_NAMES: Mapping[Any, str] = {
    int: "a whole number", float: "a finite number", str: "text that is not empty", bool: "true or false",
    dict: "a section", list: "a list",
}  # fmt: skip


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        RecipeError: no such file, not UTF-8, not YAML, a key that comes twice, or something else than fields.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _CoreLoader)
    except OSError as error:
        raise RecipeError(
            f"Cannot read {path}: {error.strerror}. Give a YAML file, such as those of examples/."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not YAML as it should be: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold fields, one a line; got {type(data).__name__}.")
    return data


def read_fields(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`: a dataclass, a plain type, or a list or mapping of those, as a field's annotation says it.

    Raises:
        RecipeError: a field is unknown, missing, of another kind or out of bounds; the message names it.
    """
    bounds = Within()
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, data, where)
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
    if origin is list:
        return [read_fields(arguments[0], value, f"{where}[{index}]") for index, value in enumerate(data)]
    return float(data) if kind is float else data


def _read_section(kind: Any, data: Any, where: str) -> Any:
    """A dataclass from a mapping with its fields."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must be a section with fields; got {reprlib.repr(data)}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(data))
    if unknown or missing:
        raise RecipeError(
            f"{where}: unknown fields {unknown}, missing fields {missing}. Known fields: {', '.join(fields)}."
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
        return isinstance(data, Mapping)
    if plain in (int, float):
        return isinstance(data, int if plain is int else int | float) and not isinstance(data, bool)
    return isinstance(data, plain) and data != ""


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: https://yaml.org/spec/1.2.2/#103-core-schema."""

    yaml_implicit_resolvers: typing.ClassVar[dict[Any, Any]] = {}
    yaml_constructors: typing.ClassVar[dict[Any, Any]] = {}


def _mapping(loader: _CoreLoader, node: yaml.MappingNode) -> dict[str, Any]:
    """Keys as they are written, each once."""
    mapping: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            raise yaml.constructor.ConstructorError(None, None, "expected text as a key", key.start_mark)
        if key.value in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key.value!r} comes twice; keep one of them", key.start_mark
            )
        mapping[key.value] = loader.construct_object(value, deep=True)  # deep: an alias into itself is an error
    return mapping


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    "null": (r"(?:~|null|Null|NULL|)\Z", [*"~nN", ""], lambda text: None),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", [*"tTfF"], lambda text: text.lower() == "true"),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", [*"-+0123456789"], _integer),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        [*"-+.0123456789"],
        _number,
    ),
    "str": ("", [], str),
}
"""Tag -> how it looks, what it begins with, and what it means; the first that fits counts."""


def _add_scalars() -> None:
    for tag, (pattern, beginnings, read) in _SCALARS.items():
        name = f"tag:yaml.org,2002:{tag}"
        if beginnings:
            _CoreLoader.add_implicit_resolver(name, re.compile(pattern), beginnings)
        _CoreLoader.add_constructor(name, lambda loader, node, read=read: read(loader.construct_scalar(node)))
    _CoreLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
    _CoreLoader.add_constructor(
        "tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True)
    )
    _CoreLoader.add_constructor(None, _CoreLoader.construct_undefined)


_add_scalars()
