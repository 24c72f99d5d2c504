"""A training that was interrupted: its checkpoints lie hidden beside its step's place until the step is finished.

In: a step's folder, and what the step reads. Out: the checkpoint that its training goes on from, where there is one
that was made from the very same.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..files import write_text
from .interruption import Interruption
from .reasons import differences, listed

_INPUTS = "inputs.json"
_STATE = "trainer_state.json"  # what Trainer writes last, so that a checkpoint that has it is whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in the middle of a training.

    Attributes:
        folder: where it is.
        step, steps: how far the training was, and how far it goes.
    """

    folder: Path
    step: int
    steps: int

    def __str__(self) -> str:
        return f"step {self.step:,} of {self.steps:,}"


class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        name: of its step.
        folder: where Trainer writes them.
        interruption: Ctrl-C or SIGTERM, which makes one; from `begin` on.
    """

    def __init__(self, step: Path, read: Mapping[str, Any], interruption: Interruption | None = None) -> None:
        """
        Args:
            step: folder of the step's result.
            read: what the step reads, as a flat mapping.
            interruption: Ctrl-C and SIGTERM; None to leave them alone, as where nothing is going to be taken up again.
        """
        self.name, self.folder = step.name, step.with_name(f".{step.name}.checkpoints")
        self.interruption, self._holds = interruption or Interruption(), interruption is not None
        self._read = dict(read)

    def last(self) -> Checkpoint | None:
        """The last one that this training can go on from."""
        return self._found() if self._before() == self._read else None

    def begin(self) -> Checkpoint | None:
        """As `last`, and ready to write further ones; those of another training are removed, which is said."""
        if self._holds:
            self.interruption.hold()
        before, found = self._before(), self._found()
        if found is not None and before != self._read:
            why = listed(differences(before or {}, self._read))
            log.warning("%s: begins anew and drops its checkpoint of %s, since %s", self.name, found, why)
        if found is None or before != self._read:
            self.remove()
            write_text(self.folder / _INPUTS, json.dumps(self._read, indent=1))
            return None
        log.info("%s: goes on from %s", self.name, found)
        return found

    def tidy(self) -> None:
        """Leave nothing behind where no training can go on."""
        if self._found() is None:
            self.remove()

    def finish(self) -> None:
        """The result is there: remove what it was made from; what another recipe has left stays."""
        if self._before() in (None, self._read):
            self.remove()

    def remove(self) -> None:
        """All of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _before(self) -> dict[str, Any] | None:
        """What the training reads that these belong to."""
        try:
            found = json.loads((self.folder / _INPUTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _found(self) -> Checkpoint | None:
        """The last whole one, whoever's it is; from one at the very end Trainer would make a step too many."""
        found = []
        for folder in self.folder.glob("checkpoint-*"):
            try:
                state = TrainerState.load_from_json(str(folder / _STATE))
            except (OSError, ValueError, TypeError):
                continue  # Trainer was killed while it wrote it
            if state.global_step < state.max_steps:
                found.append(Checkpoint(folder, state.global_step, state.max_steps))
        return max(found, key=lambda checkpoint: checkpoint.step, default=None)
