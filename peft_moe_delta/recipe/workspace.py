"""Steps whose results are kept.

In: a step's name, all that it reads, and the function that makes it. Out: the step's folder, complete or absent. What
it read is recorded beside the result, item by item. A step runs again only when one of the items has changed, or a file
of its result has, and says which. What cannot be made again in a moment, a training or what somebody has edited, is
replaced only where that is wanted. A training that was interrupted goes on where it was.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import resolve, whole_folder
from ..errors import RecipeError
from .data import file_hash
from .interruption import Interruption
from .reasons import differences, listed
from .unfinished import Checkpoints

RECORD = "step.json"
LOG_FILE = "log.json"
"""Beside the result of a training: Trainer's log."""
_VERSIONS = ("peft-moe-delta", "peft", "torch", "transformers")
_FREE = ("README", ".")  # how the names of a model's files begin that no model is loaded from
_TEMPLATES = "additional_chat_templates"  # the one folder that a tokenizer is loaded from
_EDITED = "was changed"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A finished step: its folder, and the key that stands for everything that went into it."""

    folder: Path
    key: str


class Workspace:
    """The output folder of a recipe.

    Args:
        output: the folder.
        overwrite: whether the result of a training may be replaced, and one that somebody has edited.
    """

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        self.output, self._overwrite = Path(output), overwrite

    def compares(self) -> bool:
        """Whether what a step reads counts, and has to be looked up."""
        return True

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Step:
        """Run `make(folder)` unless the folder holds the result already.

        The record beside the result says what it came from: command, versions, inputs, time and the files' hashes.

        Args:
            name: of the step, and of its folder.
            inputs: everything that `make` reads: steps before it, `file_hash` and `model_files` of what lies on the
                disk, dataclasses and plain values.
            make: writes the result into a folder.

        Raises:
            RecipeError: in the step's place there is a folder that no step has left, or one that is not replaced
                without `overwrite`.
        """
        step, read = step_of(self.output / name, inputs)
        reason = why_again(step.folder, read)
        if reason is None:
            log.info("%s: kept from an earlier run", name)
            return step
        if reason and not self._overwrite and (loss := would_be_lost(step.folder)):
            raise RecipeError(
                f"{name} would run again, since {reason}, and {loss} in {step.folder} would be lost. To replace it, "
                "say --overwrite (overwrite=True in Python). To keep it, choose another `output`. `peft-moe-delta "
                "status` lists every step that would run again."
            )
        if reason:
            log.warning("%s: runs again, since %s", name, reason)
        log.info("%s ...", name)
        started = time.time()
        with whole_folder(step.folder, overwrite=True) as partial:
            make(partial)
            seconds = round(time.time() - started, 1)
            _write_record(partial, read, seconds)
        _release_memory()
        log.info("%s: done in %.0f s", name, seconds)
        return step

    def training(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path, Checkpoints], None]) -> Step:
        """As `step`, for `make(folder, checkpoints)` that trains: at Ctrl-C or SIGTERM it saves a checkpoint, and the
        next run goes on from there.

        Raises:
            RecipeError: as `step`.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once the checkpoint, or the result, is saved.
        """
        with Interruption() as interruption:
            step, read = step_of(self.output / name, inputs)
            checkpoints = Checkpoints(step.folder, read, interruption)
            try:
                self.step(name, inputs, lambda folder: make(folder, checkpoints))
            finally:
                checkpoints.tidy()
            checkpoints.finish()
        return step


def step_of(folder: Path, inputs: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The step that a folder is to hold, and what it reads as a flat mapping."""
    read = _flat(inputs)
    return Step(folder, hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()), read


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested inputs as one mapping, from dotted names to what JSON can say."""
    if isinstance(value, Step):
        return {name: f"step:{value.key}"}
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if not isinstance(value, Mapping):
        return {name: json.loads(json.dumps(value))}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else str(key))
    return flat


def why_again(folder: Path, read: Mapping[str, Any]) -> str | None:
    """Why a step must run: "" for the first time, None where its result is there and still holds.

    Raises:
        RecipeError: there is a folder that no step has left.
    """
    record = folder / RECORD
    if not record.is_file():
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise RecipeError(
                f"{folder} has no {RECORD}, so it is not the result of a step, and a recipe replaces only those. Move "
                "it away, or choose another `output`."
            )
        return ""
    try:
        written = json.loads(record.read_text(encoding="utf-8"))
        before, files, stats = written["inputs"], written["files"], written["stats"]
        reasons = differences(before, read) + _damages(folder, files, stats)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {RECORD} is damaged, or of an earlier version"
    return listed(reasons) if reasons else None


def would_be_lost(folder: Path) -> str | None:
    """What of a result could not be made again in a moment; None where nothing is."""
    if (folder / LOG_FILE).is_file():
        return "the training"
    try:
        written = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        edited = [text for text in _damages(folder, written["files"], written["stats"]) if text.endswith(_EDITED)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return "what somebody has edited" if edited else None


def _damages(folder: Path, files: Mapping[str, str], stats: Mapping[str, list[int]]) -> list[str]:
    """What has become of a result. A file whose size and time are as they were is taken to be what it was."""
    found = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"its {name} is missing")
        elif _stat(path) != stats[name] and file_hash(path) != digest:
            found.append(f"its {name} {_EDITED}")
    return found


def _write_record(folder: Path, read: Mapping[str, Any], seconds: float) -> None:
    files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    record = {
        "command": sys.argv,
        "versions": {package: version(package) for package in _VERSIONS},
        "inputs": read,
        "seconds": seconds,
        "files": {name: file_hash(file) for name, file in files.items()},
        "stats": {name: _stat(file) for name, file in files.items()},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _release_memory() -> None:
    """Give back what a step has left, which the next could not use in pieces; glibc alone keeps it when told to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def model_files(model: str, hash_of: Callable[[Path], str] = file_hash) -> dict[str, str]:
    """What stands for a model: every file that one is loaded from, or the commit of a Hub id.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"revision": resolve(model, files=("config.json",)).name}
    files = [f for place in (folder, folder / _TEMPLATES) if place.is_dir() for f in sorted(place.iterdir())]
    return {f.relative_to(folder).as_posix(): hash_of(f) for f in files if f.is_file() and not f.name.startswith(_FREE)}
