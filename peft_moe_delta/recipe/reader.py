"""Files of settings: YAML in, fields out. The one reader of recipes, growth files, `--config` and `--set`.

The YAML is 1.2 (its core schema), where PyYAML alone reads 1.1: `no`, `on` and `2026-01-01` are text, `1e-3` is a
number, `012` is twelve. A key is the text that is written, so that the language `no` is no truth value, and a key that
comes twice is an error, of which PyYAML would drop the first.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        RecipeError: no such file, not UTF-8, not YAML, a key that comes twice, or something else than fields.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"Cannot read {path}: {error.strerror}. Give a YAML file, such as those of examples/."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not YAML as it should be: {error}") from error
    data = parsed(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold fields, one a line; got {type(data).__name__}.")
    return data


def read_change(change: str) -> dict[str, Any]:
    """`expand.steps=200` as `{"expand": {"steps": 200}}`; the value is YAML, as in the file.

    Raises:
        RecipeError: no field, no value, or a value that is not YAML.
    """
    name, equals, text = change.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set takes FIELD=VALUE, such as expand.steps=200; got {change!r}.")
    value = parsed(text, f"--set {name}: {text!r}")
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def laid_over(data: Any, changes: Any) -> Any:
    """Nested fields replaced one by one, anything else whole."""
    if not (isinstance(data, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**data, **{key: laid_over(data.get(key), value) for key, value in changes.items()}}


def parsed(text: str, where: str) -> Any:
    """What YAML says; `where` is what messages call it.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return yaml.load(text, _CoreLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not YAML as it should be: {' '.join(str(error).split())}") from error


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
