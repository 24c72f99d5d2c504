"""What a growth file says, read and checked: an adapter, the languages to add, and how they are trained.

In: a YAML file. Out: `Growth`, frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..kinds import read_fields
from ..sources import TextSource
from .fields import Precision, Review, Seed, Training
from .reader import read_yaml

CLOSEST = "closest"


@dataclass(frozen=True)
class GrowthLanguage:
    """One language of a growth file.

    Attributes:
        group: its group, a new or an existing one.
        train: its training text.
    """

    group: str
    train: str | TextSource


@dataclass(frozen=True, kw_only=True)
class GrowthTraining(Training):
    """Training of an adapter's new experts.

    Attributes:
        routing: the routing from this stage on, as in `MoeDeltaModel.start_expansion`; None keeps the adapter's.
    """

    routing: str | None = None


@dataclass(frozen=True)
class Growth:
    """A growth file: what to add to an adapter.

    Attributes:
        adapter: the adapter's folder or Hub id. It is not changed.
        output: the folder for the grown adapter.
        languages: language code -> group and text, of the languages to add. A review also needs those that the adapter
            knows already.
        experts: new group -> its experts per transformed layer, as in `add_languages`.
        model: the base model; None means the one that the adapter names.
        start_from: the group whose experts the new ones start as copies of: a name, a name for each new group, or
            `"closest"` for the group that predicts the new text best. None means expert 0.
        expand: how the new experts are trained; None leaves them untrained.
        review: how the new router rows are trained, after `fit_routers` has set them; None leaves it out. Every earlier
            group gives as much text as the others, and a new group less, in the proportion in which `fit_routers`
            weighs it less.
        precision: as in a recipe.
        seed: as in a recipe.
    """

    adapter: str
    output: str
    languages: dict[str, GrowthLanguage]
    experts: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    start_from: str | dict[str, str] | None = None
    expand: GrowthTraining | None = None
    review: Review | None = None
    precision: Precision = "auto"
    seed: Seed = 0


def read_growth(path: str | Path) -> Growth:
    """Read a growth file.

    Raises:
        RecipeError: no such file, not YAML, or a field that is unknown, missing or of the wrong kind.
    """
    growth: Growth = read_fields(Growth, read_yaml(path), str(path))
    return growth
