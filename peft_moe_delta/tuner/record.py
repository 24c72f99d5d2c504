"""`AdapterRecord`: what an adapter remembers of its life, apart from what was asked for.

In: the section `record` of an `adapter_config.json`, or the flat names that stood there before it had one. Out: one
frozen, checked value; `MoeDeltaConfig.change` puts another in its place.
"""

from __future__ import annotations

import functools
import inspect
import typing
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ..errors import CheckpointError, PlanError, RecipeError
from ..kinds import Count, Finite, Index, did_you_mean, read_fields

FORMAT = 2
"""The record's own. Format 1 had no section: the same names stood flat among the fields."""

STAGES: dict[str, tuple[float, float]] = {"expansion": (0.01, 0.0), "review": (0.0, 0.1)}
"""Stage -> default coefficients (load balancing, language prior), as published by MoE-LPR (arXiv 2408.11396)."""

T = TypeVar("T")


@dataclass(frozen=True)
class GrowthStep:
    """One call of `model.add_languages` with new groups.

    Attributes:
        groups: those that it brought.
        before: the stage, routing and coefficients that were in force, for `model.remove_group`.
    """

    groups: tuple[str, ...]
    before: dict[str, Any]


@dataclass(frozen=True)
class FittedIdentifier:
    """What `fit_identifier` fitted, beside the token counts themselves; `routing.context` has the formula.

    Attributes:
        languages: codes in the order of the counts.
        vocabulary: tokens that are counted.
        memory: tokens that are remembered.
        margin: nats a token.
        threshold: evidence that a language needs, in 1/16 nat.
    """

    languages: tuple[str, ...]
    vocabulary: Count
    memory: Count
    margin: Finite
    threshold: int


@dataclass(frozen=True)
class AdapterRecord:
    """What is filled in as an adapter is made, trained and grafted; saved as one section of its config.

    Attributes:
        format: of this section.
        stage: `"expansion"` trains experts and routers, `"review"` routers only; see `model.start_review()`.
        train_earlier_rows: whether router rows of groups that were there before the newest growth step train, too.
        language_ids: language codes in the order of their ids; append-only.
        group_order: group names in the order of their experts; append-only.
        growth: the steps by which `model.add_languages` made the adapter larger; append-only.
        open_steps: growth steps whose experts are open to every group.
        new_tokens: tokens beyond the base model's vocabulary, in the order of their ids, as the tokenizer spells them.
        first_new_token_id: id of the first of them.
        new_tokens_step: growth steps there were before them; a later step leaves their rows as they are.
        base_fingerprint: shapes and sampled weights of the base model, checked when the adapter is loaded.
        graft: what the adapter was grafted onto and how; None for one that was not grafted.
        mixed: seed, branches and rule of a model that `mix` made; None for any other.
        identifier: how languages are read from the text; None where they are not.
        doubts: what went wrong in training, for the card and for the report of a graft.

    Raises:
        PlanError: a value of a wrong type, or an unknown stage.
        CheckpointError: a format that this version does not know.
    """

    format: int = FORMAT
    stage: str = "expansion"
    train_earlier_rows: bool = False
    language_ids: tuple[str, ...] = ()
    group_order: tuple[str, ...] = ()
    growth: tuple[GrowthStep, ...] = ()
    open_steps: Index = 0
    new_tokens: tuple[str, ...] = ()
    first_new_token_id: Index | None = None
    new_tokens_step: Index = 0
    base_fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    graft: dict[str, Any] | None = None
    mixed: dict[str, Any] | None = None
    identifier: FittedIdentifier | None = None
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise CheckpointError(
                f"The adapter's record has format {self.format!r}, and this version of peft-moe-delta reads format "
                f"{FORMAT}. Where a newer version saved it, upgrade the package; otherwise the file is damaged."
            )
        for name, hint in typing.get_type_hints(AdapterRecord, include_extras=True).items():
            object.__setattr__(self, name, checked(hint, getattr(self, name), name))
        if self.stage not in STAGES:
            raise PlanError(f"Unknown stage {self.stage!r}; expected one of: {', '.join(STAGES)}.")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AdapterRecord:
        """The record among a config's fields: its section, over which flat names of it are laid.

        Raises:
            CheckpointError: a newer version saved it.
            PlanError: it is malformed.
        """
        record = config.get("record")
        if record is None:
            record = cls()
        elif isinstance(record, Mapping):
            if record.get("format") != FORMAT:
                cls(format=record.get("format"))  # type: ignore[arg-type]  # refused, before its names are
            if unknown := sorted(set(record) - {"format", *RECORDED}):
                raise PlanError(f"`record` has unknown fields {unknown}; expected some of {', '.join(RECORDED)}.")
            record = cls(**record)
        if not isinstance(record, cls):
            raise PlanError(f"`record` is filled in, an AdapterRecord; got {record!r}. Leave it out.")
        flat = {name: config[name] for name in RECORDED if name in config}
        return replace(record, **{name: RECORDED[name] if value is None else value for name, value in flat.items()})


RECORDED: Mapping[str, Any] = {f.name: f.default for f in fields(AdapterRecord) if f.name != "format"}
"""What a record holds, with the default of each."""


def checked(hint: Any, value: Any, name: str) -> Any:
    """A field's value as its annotation says.

    Raises:
        PlanError: it is of another kind, or out of bounds.
    """
    try:
        return read_fields(hint, value, f"`{name}`")
    except RecipeError as error:
        raise PlanError(str(error)) from None


def with_flat_names(config: type[T]) -> type[T]:
    """Let a config take the names of its record as its own: `stage="review"`, and adapters that were saved so.

    Reading one as `config.stage` still works and warns; `config.record.stage` is its place.
    """
    fill: Any = config.__init__

    @functools.wraps(fill)
    def init(self: Any, *args: Any, **values: Any) -> None:
        _check_known(config.__name__, values, [name for name in signature.parameters if name != "self"])
        record = AdapterRecord.of(values)
        fill(self, *args, **{name: v for name, v in values.items() if name not in RECORDED} | {"record": record})

    signature = inspect.signature(fill)  # what PEFT goes by when it drops the fields of a newer version
    flat = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in RECORDED]
    init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *flat])  # type: ignore[attr-defined]
    config.__init__ = init  # type: ignore[method-assign]
    for name in RECORDED:
        setattr(config, name, _moved(name))
    return config


def _check_known(config: str, values: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that are no fields, in Python's words: by them PEFT knows a config of a newer version.

    Raises:
        TypeError: there are some.
    """
    unknown = [name for name in values if name not in known and name not in RECORDED]
    if unknown:
        raise TypeError(
            f"{config} got an unexpected keyword argument {', '.join(map(repr, unknown))}."
            f"{did_you_mean(unknown, known)} Its fields: {', '.join(known)}."
        )


def _moved(name: str) -> property:
    def read(config: Any) -> Any:
        warn_of_flat_name(name, stacklevel=3)
        return getattr(config.record, name)

    return property(read, doc=f"Deprecated: `record.{name}`.")


def warn_of_flat_name(name: str, stacklevel: int) -> None:
    """Say where a name that moved is now."""
    advice = f"read config.record.{name}, and set it with config.change({name}=...)"
    warnings.warn(f"`{name}` has moved: {advice}.", DeprecationWarning, stacklevel=stacklevel)
