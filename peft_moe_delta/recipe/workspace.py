"""Steps whose results are kept.

In: a step's name, everything its result depends on, and the function that makes it. Out: the step's folder, complete or
absent. A step runs again only when something it depends on has changed: its fields, its input files, or a step before
it.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import whole_folder
from .data import existing

RECORD = "step.json"
_VERSIONS = ("peft-moe-delta", "peft", "torch", "transformers")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A finished step: its folder, and the key that stands for everything that went into it."""

    folder: Path
    key: str


class Workspace:
    """The output folder of a recipe."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.output.mkdir(parents=True, exist_ok=True)

    def step(self, name: str, depends_on: dict[str, Any], make: Callable[[Path], None]) -> Step:
        """Run `make(folder)` unless the folder holds the result already.

        The record beside the result says what it came from: command, versions, inputs, time and the files' hashes.
        """
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=_as_json).encode()).hexdigest()
        folder = self.output / name
        record = folder / RECORD
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["key"] == key:
            log.info("%s: kept from an earlier run", name)
            return Step(folder, key)
        log.info("%s ...", name)
        started = time.time()
        with whole_folder(folder, overwrite=True) as partial:
            make(partial)
            seconds = round(time.time() - started, 1)
            files = {str(f.relative_to(partial)): file_hash(f) for f in sorted(partial.rglob("*")) if f.is_file()}
            written = {
                "key": key,
                "command": sys.argv,
                "versions": {package: version(package) for package in _VERSIONS},
                "depends_on": depends_on,
                "seconds": seconds,
                "files": files,
            }
            text = json.dumps(written, indent=1, sort_keys=True, default=_as_json)
            (partial / RECORD).write_text(text, encoding="utf-8")
        _release_memory()
        log.info("%s: done in %.0f s", name, seconds)
        return Step(folder, key)


def _release_memory() -> None:
    """Give back what a step has left, which the next could not use in pieces; glibc alone keeps it when told to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def file_hash(path: str | Path) -> str:
    """sha256 of a file.

    Raises:
        DataError: there is no such file.
    """
    digest = hashlib.sha256()
    with existing(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def model_identity(model: str) -> Any:
    """What stands for a model: the hashes of a folder's weights and config, or a Hub id as it is."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json", ".jinja")}


def _as_json(value: Any) -> Any:
    return value.key if isinstance(value, Step) else vars(value)
