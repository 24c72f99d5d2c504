"""Where files may be: a checkpoint's files lie in its own folder, or in the Hub cache that the folder is a view of."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import CheckpointError

HUB_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt")
"""What is downloaded from the Hub: weights, configs, tokenizer, chat template. Never pickles or code."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def resolve(path_or_id: str | Path, revision: str | None = None, files: tuple[str, ...] = HUB_FILES) -> Path:
    """The local folder of a checkpoint: a folder as it is, a Hub id after downloading it (`files` only).

    Raises:
        CheckpointError: neither a folder here nor a repository that can be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{str(path_or_id)!r} is no folder here, and the Hub does not give it"
            f"{f' at revision {revision!r}' if revision else ''}: {error}. "
            "Check the spelling; for a private or gated model, log in with `hf auth login`."
        ) from error


def is_plain_name(name: object) -> bool:
    """Whether a name is that of a file in the folder at hand, and nothing else."""
    return (
        isinstance(name, str) and name not in ("", ".", "..") and name == os.path.basename(name)
        and "\\" not in name and "\0" not in name
    )  # fmt: skip


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
        CheckpointError: the name leads out of the folder, or the file is a link out of it. Links from a Hub cache's
            snapshot, or a folder within one, to its blobs are how that cache works, and stay.
    """
    path = folder / name
    if not is_plain_name(name):
        raise CheckpointError(f"{name!r} points outside its folder {folder}. Do not trust this checkpoint.")
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"Cannot follow {path}: {error}. Fetch the checkpoint again.") from error
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    if real.parent not in (home, snapshots and snapshots.parent / "blobs"):
        raise CheckpointError(
            f"{path} is a link that points outside its folder, to {real}. Copy the file into the folder if you trust "
            "it."
        )
    return path


def within(folder: Path, name: str) -> Path:
    """As `inside`, of a file that may lie in a folder of that folder; `name` has slashes between its parts."""
    *folders, last = name.split("/")
    for part in folders:
        folder = inside(folder, part)
    return inside(folder, last)


def files_in(folder: Path) -> dict[str, Path]:
    """Name -> path of every file in a folder, those in its folders under names with slashes; in order of the names."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return dict(sorted(found.items()))
