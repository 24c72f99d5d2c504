"""What a folder was made from, and whether it still is what was written.

In: a record of inputs and request. Out: `manifest.json` beside the files, with the sha256 of each and of itself; and
`verify`, which reads everything again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .header import unique_json
from .paths import files_in, inside, is_plain_name, within

MANIFEST_FILE = "manifest.json"
FORMAT = "peft-moe-delta manifest 1"
_CHUNK = 1 << 20
_FREE = ("README.md", ".")
"""How the names begin that may be added later: a card, and what Git and the Hub keep hidden."""


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_manifest(folder: Path, record: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Write the manifest of everything in a folder.

    Args:
        folder: of files, some of them in folders.
        record: what they were made from: JSON.
        known: name -> sha256 of files that need not be read again.
    """
    files = {
        name: {"bytes": file.stat().st_size, "sha256": known.get(name) or file_sha256(file)}
        for name, file in files_in(folder).items()
        if name != MANIFEST_FILE
    }
    content = {"format": FORMAT, **record, "files": files}
    content["sha256"] = _own_sha256(content)
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = inside(folder, MANIFEST_FILE)
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST_FILE}: it cannot be verified. Only finished grafts have one.")
    try:
        content: dict[str, Any] = unique_json(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this package reads {FORMAT!r}")
        if content.pop("sha256") != _own_sha256(content):
            raise ValueError("it was changed after it was written")
        if not all(is_plain_name(part) for name in content["files"] for part in name.split("/")):
            raise ValueError("it names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no manifest: {error!r}. Fetch the folder again.") from error
    return content


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every file of a folder against its manifest, and return the manifest.

    Raises:
        CheckpointError: no manifest, or files that are missing, changed, or not in it; the message lists them.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    wrong = []
    for name, expected in manifest["files"].items():
        path = within(folder, name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}")
        elif file_sha256(path) != expected["sha256"]:
            wrong.append(f"{name} has other content")
    known = {MANIFEST_FILE, *manifest["files"]}
    added = [name for name in files_in(folder) if name not in known]
    wrong += [f"{name} is not in the manifest" for name in added if not name.startswith(_FREE)]
    if wrong:
        raise CheckpointError(f"{folder} is not what was written: {'; '.join(wrong)}. Fetch or make it again.")
    return manifest


def _own_sha256(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
