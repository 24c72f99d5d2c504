"""Tensors streamed into safetensors files: every place is known before the first tensor is.

In: names, dtypes and shapes in the order of the stream; then the tensors. Out: one file, or shards with an index as
transformers writes them. Memory: the tensor that is written and the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .folder import Job
from .header import Entry, encode_header
from .manifest import file_sha256
from .reader import INDEX_FILE, SINGLE_FILE

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Shard:
    """One file to be.

    Attributes:
        name: its name.
        header: its first bytes.
        entries: tensor name -> entry, in the order of the stream; starts count from the end of the header.
    """

    name: str
    header: bytes
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(entry.size for entry in self.entries.values())


def plan_shards(stream: Iterable[tuple[str, Tensor]], max_size: int, single: str = SINGLE_FILE) -> list[Shard]:
    """Cut a stream into files of at most `max_size` bytes of tensors; a larger tensor gets a file of its own.

    Args:
        stream: (name, tensor), for example on the meta device: only dtypes and shapes are read.
        single: name of the file where one is enough; the names of several follow from it as transformers has it.

    Raises:
        CheckpointError: a name comes twice.
    """
    groups: list[dict[str, Entry]] = [{}]
    seen: set[str] = set()
    room = max_size
    for name, tensor in stream:
        entry = Entry(tensor.dtype, tuple(tensor.shape))
        if name in seen:
            raise CheckpointError(f"{name} would be written twice. Please report the model's config.")
        if groups[-1] and entry.size > room:
            groups.append({})
            room = max_size
        seen.add(name)
        groups[-1][name] = entry
        room -= entry.size
    if len(groups) == 1:
        return [_shard(single, groups[0])]
    stem = single.removesuffix(".safetensors")
    return [
        _shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def index_of(shards: list[Shard]) -> str | None:
    """The text of the index of several shards; None for a single file."""
    if len(shards) == 1:
        return None
    total = sum(entry.size for shard in shards for entry in shard.entries.values())
    weight_map = {name: shard.name for shard in shards for name in shard.entries}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Write the index, where one is needed."""
    text = index_of(shards)
    if text is not None:
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def write_shards(
    job: Job,
    shards: list[Shard],
    stream: Callable[[int], Iterator[tuple[str, Tensor]]],
    progress: Callable[[int], object],
) -> None:
    """Write what is not finished. One thread computes; one hashes and writes; one waits for the disk.

    Args:
        job: the folder.
        shards: from `plan_shards`.
        stream: how many tensors to leave out -> (name, tensor) of the others, in the planned order.
        progress: is told of bytes written.

    Raises:
        CheckpointError: the stream does not keep to the plan.
        OSError: the disk is full or fails.
    """
    done = 0
    while done < len(shards) and shards[done].name in job.finished:
        progress(shards[done].size)
        done += 1
    tensors = stream(sum(len(shard.entries) for shard in shards[:done]))
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as finisher:
        finishing: list[Future[None]] = []
        for shard in shards[done:]:
            sha256 = _write(job.folder / f"{shard.name}.partial", shard, tensors, writer, progress)
            (job.folder / f"{shard.name}.partial").rename(job.folder / shard.name)
            finishing.append(finisher.submit(job.finish, shard.name, sha256))
        for future in finishing:
            future.result()


def _write(
    path: Path, shard: Shard, tensors: Iterator[tuple[str, Tensor]], writer: ThreadPoolExecutor,
    progress: Callable[[int], object],
) -> str:  # fmt: skip
    """Write one file and return its sha256."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(content: memoryview, start: int) -> None:
            file.seek(start)
            for begin in range(0, len(content), _CHUNK):
                chunk = content[begin : begin + _CHUNK]
                digest.update(chunk)
                written = 0
                while written < len(chunk):
                    written += file.write(chunk[written:]) or 0
                progress(len(chunk))

        pending = writer.submit(put, memoryview(shard.header), 0)
        end, in_order = 0, True
        for name, entry in shard.entries.items():
            found, tensor = next(tensors)
            if (found, tensor.dtype, tuple(tensor.shape)) != (name, entry.dtype, entry.shape) or tensor.is_meta:
                raise CheckpointError(f"{name} was planned, {found} came. Please report the model's config.")
            in_order, end = in_order and entry.start == end, entry.start + entry.size
            pending.result()
            pending = writer.submit(put, _bytes(tensor), len(shard.header) + entry.start)
        pending.result()
    return digest.hexdigest() if in_order else file_sha256(path)


def _shard(name: str, entries: dict[str, Entry]) -> Shard:
    """Wide numbers first, so that every tensor is aligned, whatever comes before it."""
    starts: dict[str, Entry] = {}
    start = 0
    for key, entry in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[key] = replace(entry, start=start)
        start += entry.size
    return Shard(name, encode_header(starts, {"format": "pt"}), {key: starts[key] for key in entries})


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's own memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
