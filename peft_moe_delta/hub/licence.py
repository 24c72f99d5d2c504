"""Which licence a model may be published under, given those of the models it was made from.

In: parents and their licences, by the Hub's identifiers. Out: the licence of the card, never a laxer one. This compares
identifiers; it is no legal advice, and says "unknown" rather than guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..errors import CardError

PERMISSIVE = ("cc0-1.0", "unlicense", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
"""Licences whose material may be passed on under another one; each asks at least what those before it ask."""

UNKNOWN, OTHER = "unknown", "other"


def licence_of(model: str | Path) -> str | None:
    """The licence that a model's own card states; None where there is no card, or none that can be read."""
    try:
        if Path(model).is_dir():
            readme = Path(model) / "README.md"
            stated = ModelCard.load(readme).data.license if readme.is_file() else None
        else:
            stated = ModelCard.load(str(model)).data.license
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError, ValueError, yaml.YAMLError):
        return None  # offline, private or misspelt: unknown, and the card says so
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    return stated.lower() if isinstance(stated, str) else None


def licence_for(parents: Mapping[str, str | None], claimed: str | None = None) -> str:
    """The licence of a model made from `parents`.

    Args:
        parents: model -> licence; None or `"unknown"` where it is not known.
        claimed: what the author wants to state; None for the strictest of the parents'.

    Returns:
        The strictest parent's licence; `"other"` where two parents' licences cannot be ordered; `"unknown"` where a
        parent's is not known.

    Raises:
        CardError: `claimed` is laxer than a parent's licence, or cannot be compared with it.
    """
    known = {model: (licence or UNKNOWN).lower() for model, licence in parents.items()}
    inherited = _strictest(list(known.values()))
    if claimed is None or claimed.lower() in (inherited, OTHER, UNKNOWN):
        return inherited if claimed is None else claimed.lower()
    for model, licence in known.items():
        if not _covers(claimed.lower(), licence):
            hint = (
                f"Say what it is, as in parents={{{model!r}: 'apache-2.0'}}"
                if licence == UNKNOWN
                else f"Leave the licence out, which gives {inherited!r}"
            )
            raise CardError(
                f"The card claims the licence {claimed!r}, but {model}, which the model was made from, is under "
                f"{licence!r}: laxer terms than a parent's, or ones that cannot be compared, are not stated. {hint}."
            )
    return claimed.lower()


def _strictest(licences: list[str]) -> str:
    if UNKNOWN in licences or not licences:
        return UNKNOWN
    restrictive = {licence for licence in licences if licence not in PERMISSIVE}
    if len(restrictive) > 1:
        return OTHER
    return restrictive.pop() if restrictive else max(licences, key=PERMISSIVE.index)


def _covers(claimed: str, parent: str) -> bool:
    """Whether `claimed` asks at least what `parent` asks."""
    if parent not in PERMISSIVE or claimed == parent:
        return claimed == parent
    return claimed not in PERMISSIVE or PERMISSIVE.index(claimed) > PERMISSIVE.index(parent)
