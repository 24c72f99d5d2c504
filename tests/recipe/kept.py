"""What two runs of a recipe must have in common, byte by byte, and what may differ, as it tells when they were made and
how fast."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft_moe_delta.checkpoint import file_sha256
from peft_moe_delta.recipe.scoring import FINDINGS
from peft_moe_delta.recipe.workspace import LOG_FILE, RECORD

OF_ONE_RUN = {
    RECORD: {"command", "versions", "seconds", "stats", LOG_FILE, FINDINGS},  # two of them: hashes of what follows
    LOG_FILE: {"train_runtime", "train_samples_per_second", "train_steps_per_second"},
    FINDINGS: {"tokens_per_second", "peak_memory_bytes"},
    "report.json": {"tokens_per_second", "peak_memory_bytes"},
}
"""Names in JSON files, wherever they stand. report.html has them as cells of a table: there no number counts."""


def contents(folder: Path) -> dict[str, Any]:
    """Every file in a folder, hidden ones too: its hash, or what it says beyond its own run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.name in OF_ONE_RUN:
        return _without(json.loads(path.read_text(encoding="utf-8")), OF_ONE_RUN[path.name])
    if path.suffix == ".html":
        return re.sub(r"<td>[\d.,]+</td>", "", path.read_text(encoding="utf-8"))
    return file_sha256(path)


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(item, names) for name, item in value.items() if name not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value
