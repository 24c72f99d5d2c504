"""A run that is looked at and not made: which steps its workspace has, and why the others would run.

In: a recipe. Out: its steps in order, as `Seen`. Nothing is written, and no model is loaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PeftMoeDeltaError
from ..kinds import size_text
from .fields import Recipe, Training
from .run import Run
from .unfinished import Checkpoint, Checkpoints
from .workspace import RECORD, Step, Workspace, step_of, why_again, would_be_lost

_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


@dataclass(frozen=True)
class Seen:
    """A step as it stands.

    Attributes:
        name: of the step.
        folder: of its result.
        reason: why it would run; "" for the first time, None where its result is there and still holds.
        checkpoint: where its training would go on; None where it begins.
    """

    name: str
    folder: Path
    reason: str | None
    checkpoint: Checkpoint | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is a result, current or not."""
        return (self.folder / RECORD).is_file()

    @property
    def state(self) -> str:
        """What a run would do, in words."""
        if self.reason is None:
            return "kept"
        if not self.reason:
            return "runs for the first time" if self.checkpoint is None else f"goes on from {self.checkpoint}"
        place = "" if self.checkpoint is None else f" from {self.checkpoint}"
        asks = " (needs --overwrite)" if would_be_lost(self.folder) else ""
        return f"runs again{place}, since {self.reason}{asks}"

    @property
    def age(self) -> str:
        """How long ago it was made; nothing where it was not."""
        if not self.is_done:
            return ""
        seconds = time.time() - (self.folder / RECORD).stat().st_mtime
        for size, unit in _UNITS:
            if seconds >= size:
                number = int(seconds // size)
                return f"{number} {unit}{'s' if number > 1 else ''} ago"
        return "just now"

    @property
    def size(self) -> int | None:
        """Bytes of its result; None where there is none, or its record is damaged."""
        try:
            stats = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["stats"]
            return sum(size for size, _ in stats.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


class Preview(Workspace):
    """A workspace that looks at steps and makes none.

    Attributes:
        seen: the steps that were asked for, in order.
    """

    def __init__(self, output: str | Path) -> None:
        super().__init__(output)
        self.seen: list[Seen] = []
        self._is_new = not any(self.output.rglob(RECORD))

    def compares(self) -> bool:
        """Not in a new folder: there is nothing to compare with, and a model's files are large to hash."""
        return not self._is_new

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Step:
        """As `Workspace.step`, and nothing is made."""
        step, read = step_of(self.output / name, inputs)
        self.seen.append(Seen(name, step.folder, why_again(step.folder, read)))
        return step

    def training(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path, Checkpoints], None]) -> Step:
        """As `Workspace.training`, and nothing is made."""
        step, read = step_of(self.output / name, inputs)
        self.seen.append(Seen(name, step.folder, why_again(step.folder, read), Checkpoints(step.folder, read).last()))
        return step


def seen_steps(recipe: Recipe, *, whole: bool) -> list[Seen]:
    """The steps of a recipe in order.

    Args:
        recipe: whose steps.
        whole: whether all of them; else those up to the adapter.

    Raises:
        RecipeError: in a step's place there is a folder that no step has left.
        DataError, CheckpointError: a file or a model that a step reads is not there.
    """
    preview = Preview(recipe.output)
    run = Run(recipe, preview)
    if whole:
        run.measured()
    else:
        run.adapter()
    return preview.seen


def trainings(recipe: Recipe) -> dict[str, Training]:
    """Step -> the fields of the training that it is."""
    found = {"post_trained": recipe.tune, "expanded": recipe.expand, "reviewed": recipe.review, "dense": recipe.dense}
    return {name: fields for name, fields in found.items() if fields is not None}


def status(recipe: Recipe) -> str:
    """A table of the steps: how old and how large each is, and what the next run would do with it. Where a run would
    not come to its end, the steps up to there, the adapter's in any case, and why.

    Raises:
        PeftMoeDeltaError: not even the adapter's steps can be looked at.
    """
    preview = Preview(recipe.output)
    run = Run(recipe, preview)
    why_not: list[str] = []
    try:
        run.measured()
    except PeftMoeDeltaError as error:
        run.adapter()  # a recipe may be there to train alone
        why_not = ["", f"`run` would not get further: {error}"]
    rows = [(s.name, s.age, "" if s.size is None else size_text(s.size), s.state) for s in preview.seen]
    return "\n".join([table([("step", "made", "size", "the next run"), *rows]), *why_not])


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns side by side."""
    listed = list(rows)
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in listed)
    return "\n".join(line.rstrip() for line in lines)
