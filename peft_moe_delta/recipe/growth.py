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
        group: new or known.
        train: where its text is.
    """

    group: str
    train: str | TextSource


@dataclass(frozen=True, kw_only=True)
class GrowthTraining(Training):
    """Expansion of an adapter that grows.

    Attributes:
        routing: from here on, as in `MoeDeltaModel.start_expansion`; None for that of the adapter.
    """

    routing: str | None = None


@dataclass(frozen=True)
class Growth:
    """A growth file: what to add to an adapter.

    Attributes:
        adapter: folder or Hub id of the adapter, which stays as it is.
        output: folder of the grown adapter.
        languages: code -> group and text: those to add, and for a review those the adapter knows.
        experts: new group -> experts in each transformed layer, as in `add_languages`.
        model: the base model; None for the one the adapter names.
        start_from: `"closest"` for the group whose experts write the new text in the fewest bits, a group's name, one
            a new group, or None for expert 0.
        expand: training of the new experts on the new languages; None to leave them untrained.
        review: training of the new router rows, from where `fit_routers` puts them, on equally much text of every
            group, but for the new ones, of which there is as much less as `fit_routers` weighs them less; None to leave
            it out.
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
