"""Checkpoints as safetensors files: read lazily, written whole or not at all.

In: a folder (or Hub id) with one safetensors file or with shards and an index. Out: a mapping from tensor name to
tensor that reads one tensor at a time. Pickled checkpoints are refused: loading one runs the code inside it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt")
"""What is downloaded from the Hub: weights, configs, tokenizer, chat template. Never pickles or code."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointReader(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; opening it reads headers only, `reader[name]` reads one tensor.

    Attributes:
        path: the folder, or the file itself.
        shapes: tensor name -> shape.
        dtypes: tensor name -> dtype.
        metadata: what the file's header says beside the tensors; empty for shards.

    Raises:
        CheckpointError: on opening: no such folder, no safetensors in it, a missing, damaged or misplaced file, or an
            index that does not match its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        single = self.path / SINGLE_FILE if self.path.is_dir() else self.path
        if single.is_file():
            self._read_header(single, None)
        elif (self.path / INDEX_FILE).is_file():
            for file, names in _shards(self.path / INDEX_FILE).items():
                self._read_header(self.path / file, names)
        else:
            raise CheckpointError(_why_unreadable(self.path))

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"CheckpointReader({str(self.path)!r}, {len(self)} tensors)"

    def _read_header(self, path: Path, names: list[str] | None) -> None:
        """Enter a file's tensors, or those the index assigns to it."""
        with _opened(path) as file:
            held = list(file.keys())
            missing = set(names or ()) - set(held)
            if missing:
                raise CheckpointError(
                    f"{path.name} does not hold {first_few(sorted(missing))}, which {INDEX_FILE} places there; it "
                    f"holds {first_few(held)}. They are of different checkpoints: fetch {path.parent} again."
                )
            for name in held if names is None else names:
                entry = file.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{name} in {path} is stored as {entry.get_dtype()}; can read {', '.join(_DTYPES)}. "
                        "Use an unquantised checkpoint."
                    )
                self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), _DTYPES[entry.get_dtype()]
                self._files[name] = path
            if names is None:
                self.metadata = dict(file.metadata() or {})


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a folder as it is, a Hub id after downloading it (`HUB_FILES` only).

    Raises:
        CheckpointError: neither a folder here nor a repository that can be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{str(path_or_id)!r} is no folder here, and the Hub does not give it"
            f"{f' at revision {revision!r}' if revision else ''}: {error}. "
            "Check the spelling; for a private or gated model, log in with `hf auth login`."
        ) from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file beside its place, then move it there: readers see the old file or the new one.

    Args:
        path: the file; its folder is made if need be.
        tensors: any dtype and device; no two may share memory.
        metadata: further strings for the header.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"format": "pt", **(metadata or {})},
        )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error and vanishes otherwise.

    Raises:
        CheckpointError: before anything is written: `output` is a file, or holds files and `overwrite` is false.
    """
    output = Path(output).resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not overwrite):
        kind = "a file" if output.is_file() else "a folder with files in it"
        raise CheckpointError(
            f"{output} is {kind}. Choose another output folder, or pass overwrite=True to replace one."
        )
    partial, replaced = _beside(output), _beside(output)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder, so that moving from it is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened with an error that says what is wrong with it."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the index names it. Fetch the checkpoint again.")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}. It is truncated or "
            "damaged; fetch it again."
        ) from error
    with file as handle:
        yield handle


def _shards(index: Path) -> dict[str, list[str]]:
    """Shard file name -> names of its tensors, from an index."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'{index} is no index: {error!r}. Expected JSON with {{"weight_map": {{tensor: file}}}}; fetch it again.'
        ) from error
    outside = [file for file in shards if file != os.path.basename(file) or file in ("", ".", "..")]
    if outside:
        raise CheckpointError(
            f"{index} points outside its folder: {first_few(outside)}. Shards must be plain file names; do not trust "
            "this checkpoint."
        )
    return shards


def _why_unreadable(path: Path) -> str:
    """What a path without readable tensors is."""
    if not path.exists():
        return f"No checkpoint at {path}: there is no such folder. Check the path, or `resolve` a Hub id first."
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds only pickled weights ({first_few(pickles)}), which can run code when loaded; they are "
            "refused. Load the model once where you trust it, and save_pretrained it as safetensors."
        )
    return f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Pass the folder that save_pretrained wrote."


def first_few(names: Iterable[str]) -> str:
    """For messages: the first three names and how many more there are; "nothing" of none."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
