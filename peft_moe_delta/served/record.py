"""What is kept of comparisons with servers: which engine, in which version, how near it came.

In: a `Comparison`. Out: `served.json` beside the export, from which its card says in what it was verified.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import read_text, write_text
from .compare import AGREES, Comparison

FILE = "served.json"


@dataclass(frozen=True)
class Verified:
    """One engine that answers as the export does.

    Attributes:
        engine: as it calls itself.
        version: of it; None where it does not tell.
        form: what it ran: the export itself, or the name of a GGUF file.
        difference: the largest of log-probabilities; None where none were compared.
        tolerance: what was allowed.
        languages: of the prompts.
        checks: what was compared and agreed.
    """

    engine: str
    version: str | None
    form: str
    difference: float | None
    tolerance: float
    languages: tuple[str, ...]
    checks: tuple[str, ...]

    @classmethod
    def of(cls, comparison: Comparison, engine: str, form: str) -> Verified:
        """What a comparison that agrees has shown."""
        found = [finding for finding in comparison.findings if finding.outcome == AGREES]
        known = [finding.difference for finding in found if finding.difference is not None]
        return cls(
            engine=engine,
            version=comparison.version,
            form=form,
            difference=max(filter(math.isfinite, known), default=None),
            tolerance=comparison.tolerance,
            languages=tuple(dict.fromkeys(finding.language for finding in found)),
            checks=tuple(dict.fromkeys(finding.check for finding in found)),
        )


def record(folder: Path, verified: Verified) -> Path:
    """Put what was verified into the export's `served.json`, in the place of the same engine's earlier word on the same
    form. Returns the file.

    Raises:
        DataError: the file is there and damaged.
    """
    file = folder / FILE
    others = [one for one in read(file) if (one["engine"], one["form"]) != (verified.engine, verified.form)]
    rows = sorted([*others, asdict(verified)], key=lambda one: (one["engine"], one["form"]))
    write_text(file, json.dumps({"verified": rows}, indent=1, ensure_ascii=False) + "\n")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a `served.json`; none where there is no such file.

    Raises:
        DataError: it holds something else.
    """
    if not file.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(read_text(file))["verified"]
        any((one["engine"], one["form"]) for one in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is not what `verify-served --record` writes: {error!r}. Remove it.") from error
    return rows
