"""Checkpoints as safetensors files, read one tensor at a time.

In: a folder (or a file) with one safetensors file, or with shards and an index. Out: a mapping from tensor name to
tensor. Files are read, not mapped: mapped pages would count as memory in use. Pickled checkpoints are refused: loading
one runs the code inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensors import Tensors, sampled_rows
from .header import Entry, read_header, unique_json
from .paths import inside, is_plain_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointReader(Tensors):
    """The tensors of a checkpoint by name; opening it reads headers only, `reader[name]` reads one tensor.

    Attributes:
        path: the folder, or the file itself.
        files: the safetensors files, in the index's order.
        shapes: tensor name -> shape.
        dtypes: tensor name -> dtype.
        metadata: what the file's header says beside the tensors; empty for shards.

    Raises:
        CheckpointError: on opening: no such folder, no safetensors in it, a missing, damaged or misplaced file, or an
            index that does not match its shards. On reading: the file has become shorter since.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: list[Path] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[Path, Entry]] = {}
        if self.path.is_file():
            self._enter(self.path, None)
        elif (self.path / SINGLE_FILE).is_file():
            self._enter(inside(self.path, SINGLE_FILE), None)
        elif (self.path / INDEX_FILE).is_file():
            for file, names in _shards(self.path).items():
                self._enter(inside(self.path, file), names)
        else:
            raise CheckpointError(_why_unreadable(self.path))

    def __getitem__(self, name: str) -> Tensor:
        entry = self._places[name][1]
        return self._read(name, [(entry.start, entry.size)]).reshape(entry.shape)

    def sample(self, name: str) -> Tensor:
        entry = self._places[name][1]
        if not entry.shape or not entry.size:
            return self[name]
        rows, size = sampled_rows(entry.shape[0]), entry.size // entry.shape[0]
        return self._read(name, [(entry.start + row * size, size) for row in rows]).reshape(-1, *entry.shape[1:])

    def elements(self, name: str, places: Sequence[int]) -> Tensor:
        """Single numbers of a tensor, by their places in row-major order; nothing else of it is read."""
        entry = self._places[name][1]
        width = entry.dtype.itemsize
        return self._read(name, [(entry.start + place * width, width) for place in places])

    def _read(self, name: str, parts: Sequence[tuple[int, int]]) -> Tensor:
        """`(start, bytes)` after `(start, bytes)` of a tensor's file, flat, in its dtype."""
        path, entry = self._places[name]
        content = torch.empty(sum(size for _, size in parts), dtype=torch.uint8)
        view = content.numpy().data
        filled = end = 0
        try:
            with path.open("rb", buffering=0) as file:
                for start, size in parts:
                    file.seek(start)
                    end += size
                    while filled < end and (count := file.readinto(view[filled:end])):
                        filled += count
        except OSError as error:
            raise CheckpointError(f"Cannot read {name} from {path}: {error}.") from error
        if filled < end:
            raise CheckpointError(f"{path} ends within {name}: it was cut short while in use. Fetch it again.")
        return content.view(entry.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"CheckpointReader({str(self.path)!r}, {len(self)} tensors)"

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype without content, on the meta device."""
        return torch.empty(self.shapes[name], dtype=self.dtypes[name], device="meta")

    def _enter(self, path: Path, names: list[str] | None) -> None:
        """Enter a file's tensors, or those the index assigns to it."""
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the index names it. Fetch the checkpoint again.")
        header = read_header(path)
        missing = set(names or ()) - set(header.entries)
        if missing:
            raise CheckpointError(
                f"{path.name} does not hold {first_few(sorted(missing))}, which {INDEX_FILE} places there; it "
                f"holds {first_few(header.entries)}. They are of different checkpoints: fetch {path.parent} again."
            )
        self.files.append(path)
        wanted = header.entries if names is None else set(names)
        for name, entry in header.entries.items():
            if name in wanted:
                self._places[name] = path, entry
                self.shapes[name], self.dtypes[name] = entry.shape, entry.dtype
        if names is None:
            self.metadata = dict(header.metadata)


def _shards(folder: Path) -> dict[str, list[str]]:
    """Shard file name -> names of its tensors, from the folder's index."""
    index = inside(folder, INDEX_FILE)
    try:
        weight_map: dict[str, Any] = unique_json(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(file, []).append(name)
        if not shards or not all(isinstance(file, str) for file in shards):
            raise TypeError("weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{index} is no index: {error!r}. Expected JSON with {{"weight_map": {{tensor: file}}}}; fetch it again.'
        ) from error
    outside = [file for file in shards if not is_plain_name(file)]
    if outside:
        raise CheckpointError(
            f"{index} points outside its folder: {first_few(map(repr, outside))}. Shards must be plain file names; do "
            "not trust this checkpoint."
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
