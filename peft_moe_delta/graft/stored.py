"""A delta as a file of its own, written and read one tensor at a time.

In: a `PostTrainingDelta`. Out: one safetensors file to share without the post-trained model, and the post-trained
weights again from it and the base. In full rank and fp32 they come back bit for bit: where `W_0 + Delta`, summed in
fp64 and rounded once, misses the weight, the weight itself is stored beside (a weight much smaller than its delta, some
per mille of an fp32 model, next to none of a 16-bit one). In bf16 or in low rank they come back with an error, which
the file states.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..checkpoint import CheckpointReader
from ..checkpoint.header import Entry, encode_header
from ..errors import CheckpointError, GraftError
from ..files import whole_file
from ..tensors import is_embedding
from .report import DeltaReport
from .rows import VocabularyMap

FORMAT = "peft-moe-delta post-training delta"
VERSION = 2
_BLOCK = 2**22
"""Elements that are summed in fp64 at a time."""
_INDEX, _VALUE, _LEFT, _RIGHT = "#index", "#value", "#left", "#right"
_ROWS = "#base_row"
_OVERSAMPLING, _ITERATIONS = 8, 4
"""Of the randomised SVD (Halko, Martinsson and Tropp, arXiv 0909.4061)."""


@dataclass(frozen=True)
class StoredTensor:
    """What the file says of one tensor; norms are squared, in fp64.

    Attributes:
        dtype: the post-trained weight's, such as `"bfloat16"`.
        shape: its shape.
        base_sha256: hash of the base's weight, see `sha256_of`.
        weight, delta, error: `||W_0||^2`, `||Delta||^2`, and `||stored - Delta||^2`.
        differing: elements of the post-trained weight that come back different; None for a combination, which has no
            post-trained weight.
        corrected: elements that are stored themselves.
        rank: of a low-rank form; None for a full one.
    """

    dtype: str
    shape: tuple[int, ...]
    base_sha256: str
    weight: float
    delta: float
    error: float = 0.0
    differing: int | None = 0
    corrected: int = 0
    rank: int | None = None


@dataclass(frozen=True)
class DeltaFile:
    """An opened delta file.

    Attributes:
        path: the file.
        tensors: name -> what is stored of it.
        vocabulary: how the rows of the embeddings belong to the base's; None where row r is row r.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    vocabulary: VocabularyMap | None
    _reader: CheckpointReader

    @classmethod
    def open(cls, path: str | Path) -> DeltaFile:
        """Read the header.

        Raises:
            CheckpointError: the file is missing, damaged, no delta, or of another version.
        """
        reader = CheckpointReader(path)
        try:
            header = json.loads(reader.metadata[FORMAT])
            version = header["version"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path} is no post-training delta: its header has no {FORMAT!r}. Pass a file that "
                "PostTrainingDelta.save wrote; two whole checkpoints go to from_checkpoints."
            ) from None
        if version != VERSION:
            raise CheckpointError(
                f"{path} is a post-training delta of version {version}, this package reads version {VERSION}. Use the "
                "package's version that wrote it, or save the delta again."
            )
        try:
            tensors = {
                name: StoredTensor(**{**fields, "shape": tuple(fields["shape"])})
                for name, fields in header["tensors"].items()
            }
            missing = [part for name, stored in tensors.items() for part in _parts(name, stored) if part not in reader]
            vocabulary = VocabularyMap(reader[_ROWS], header["next_id"]) if _ROWS in reader else None
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: its header lacks {error}. Fetch it again.") from error
        if missing:
            raise CheckpointError(f"{path} is damaged: it lacks {missing[0]}. Fetch it again.")
        return cls(Path(path), tensors, vocabulary, reader)

    def report(self) -> DeltaReport:
        """Sizes and errors by part of the model, from the header alone."""
        squares = ((name, stored.delta, stored.weight) for name, stored in self.tensors.items())
        return DeltaReport.of(squares, {name: stored.error for name, stored in self.tensors.items()})

    def delta(self, name: str) -> Tensor:
        """The stored delta of one tensor, in fp32 or the dtype it was stored in; low rank is multiplied out."""
        stored = self.tensors[name]
        if stored.rank is None:
            return self._reader[name]
        return self._reader[name + _LEFT].float() @ self._reader[name + _RIGHT].float()

    def restore(self, name: str, base: Tensor) -> Tensor:
        """The post-trained weight over the base's, `(W_0 + Delta)` rounded once to its dtype.

        Raises:
            GraftError: the base's weight is not the one the delta was computed from.
        """
        stored = self.tensors[name]
        if sha256_of(base) != stored.base_sha256:
            raise GraftError(
                f"{self.path} was computed from another base model: {name} has other values. "
                "Load it over the base it was saved with."
            )
        base = _aligned(name, base, stored.shape, self.vocabulary).reshape(-1)
        delta = self.delta(name).reshape(-1)
        restored = torch.empty(len(delta), dtype=getattr(torch, stored.dtype))
        for block in _blocks(len(delta)):
            restored[block] = (base[block].double() + delta[block].double()).to(restored.dtype)
        if stored.corrected:
            restored[self._reader[name + _INDEX].long()] = self._reader[name + _VALUE].to(restored.dtype)
        return restored.reshape(stored.shape)


@torch.no_grad()
def write_delta(
    path: str | Path, names: Sequence[str], base: Mapping[str, Tensor], post_trained: Mapping[str, Tensor],
    vocabulary: VocabularyMap | None, dtype: torch.dtype, rank: int | None,
) -> None:  # fmt: skip
    """Write a delta; holds one tensor at a time, and the corrections of one. See `PostTrainingDelta.save`."""
    with _writer(Path(path), names, vocabulary) as file:
        for name in names:
            start, end = base[name].detach().cpu(), post_trained[name].detach().cpu()
            checksum = sha256_of(start)
            start = _aligned(name, start, tuple(end.shape), vocabulary)
            header = StoredTensor(str(end.dtype).removeprefix("torch."), tuple(end.shape), checksum, 0.0, 0.0)
            if rank is not None and end.dim() == 2 and rank * sum(end.shape) < end.numel():
                left, right = _low_rank(end.double() - start.double(), rank, dtype)
                file.put(name + _LEFT, left)
                file.put(name + _RIGHT, right)
                approximation = left.float() @ right.float()
                file.tensors[name] = _put_blocks(None, name, header, start, end, approximation, rank=rank)
            else:
                file.tensors[name] = _put_blocks(file, name, header, start, end, None, dtype=dtype)


@torch.no_grad()
def combine_deltas(parts: Sequence[tuple[str | Path, float]], output: str | Path, dtype: torch.dtype) -> None:
    """`sum_i w_i Delta_i` of deltas over one base, as a delta file; summed in fp64, one tensor at a time.

    Args:
        parts: delta files and their weights.
        output: the file to write.
        dtype: that it is stored in.

    Raises:
        CheckpointError: a file cannot be read.
        GraftError: the deltas are of different bases, shapes or vocabularies, or no part is given.
    """
    files = [(DeltaFile.open(path), weight) for path, weight in parts]
    if not files:
        raise GraftError("No delta to combine was given. Name at least one file with its weight.")
    first = files[0][0]
    for other, _ in files[1:]:
        rows = [file.vocabulary.base_row.tolist() if file.vocabulary else None for file in (first, other)]
        same = first.tensors.keys() == other.tensors.keys() and all(
            (ours.base_sha256, ours.shape) == (other.tensors[name].base_sha256, other.tensors[name].shape)
            for name, ours in first.tensors.items()
        )
        if not same or rows[0] != rows[1]:
            raise GraftError(
                f"{first.path} and {other.path} are not deltas of one base model with one vocabulary. Combine only "
                "deltas that were computed from the same base."
            )
    with _writer(Path(output), tuple(first.tensors), first.vocabulary) as file:
        for name, stored in first.tensors.items():
            total = torch.zeros(stored.shape, dtype=torch.float64)
            for part, weight in files:
                total += weight * part.delta(name).double()
            rounded = total.to(dtype)
            file.put(name, rounded)
            error, size = _square(rounded.double() - total), _square(total)
            file.tensors[name] = StoredTensor(
                stored.dtype, stored.shape, stored.base_sha256, stored.weight, size, error, None
            )


def sha256_of(tensor: Tensor) -> str:
    """Hash of a tensor's values in fp32, so that the same weights loaded in a wider dtype have the same hash."""
    flat, digest = tensor.detach().reshape(-1), hashlib.sha256()
    for block in _blocks(len(flat)):
        digest.update(flat[block].float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _put_blocks(
    file: _DeltaWriter | None, name: str, header: StoredTensor, start: Tensor, end: Tensor,
    approximation: Tensor | None, *, dtype: torch.dtype = torch.float32, rank: int | None = None,
) -> StoredTensor:  # fmt: skip
    """Store a delta block by block (or measure an approximation of it), and sum up what the file says of it."""
    base, weights = start.reshape(-1), end.reshape(-1)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[end.element_size()]
    sums, differing = torch.zeros(3, dtype=torch.float64), 0
    indices: list[Tensor] = []
    full = torch.empty(end.shape if file else 0, dtype=dtype)
    for block in _blocks(len(weights)):
        wide = base[block].double()
        change = weights[block].double() - wide
        if not change.isfinite().all():
            raise GraftError(
                f"The post-training delta of {name} has values that are not finite. One of the two checkpoints is "
                "damaged or overflows; fetch it again."
            )
        stored = change.to(dtype) if approximation is None else approximation.reshape(-1)[block]
        restored = (wide + stored.double()).to(end.dtype)
        missed = (restored.view(integers) != weights[block].view(integers)).nonzero().squeeze(1)
        differing += len(missed)
        indices.append(missed + block.start)
        sums += torch.stack([_norm(wide), _norm(change), _norm(stored.double() - change)])
        if file is not None:
            full.view(-1)[block] = stored
    weight, delta, error = sums.tolist()
    corrected = 0
    if file is not None:
        file.put(name, full)
        if dtype == torch.float32 and differing:
            corrected, index = differing, torch.cat(indices)
            kind = torch.int32 if len(weights) < 2**31 else torch.int64
            file.put(name + _INDEX, index.to(kind))
            file.put(name + _VALUE, weights[index].to(torch.promote_types(end.dtype, torch.float32)))
    return StoredTensor(
        header.dtype, header.shape, header.base_sha256, weight, delta, error, differing - corrected, corrected, rank
    )


def _low_rank(delta: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best factors (m, rank) and (rank, n) of a delta by SVD; exact for small matrices, randomised for large."""
    if min(delta.shape) <= 4 * (rank + _OVERSAMPLING):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(delta.float(), rank + _OVERSAMPLING, _ITERATIONS)
        right = right.T
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype)


def _aligned(name: str, base: Tensor, shape: tuple[int, ...], vocabulary: VocabularyMap | None) -> Tensor:
    """The base's weight in the post-trained rows; zeros for rows that are stored whole."""
    if vocabulary is None or not is_embedding(name):
        return base
    return vocabulary.align(base, torch.zeros(shape, dtype=base.dtype))


def _parts(name: str, stored: StoredTensor) -> list[str]:
    """The tensors of the file that one weight is stored in."""
    parts = [name] if stored.rank is None else [name + _LEFT, name + _RIGHT]
    return [*parts, name + _INDEX, name + _VALUE] if stored.corrected else parts


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _square(tensor: Tensor) -> float:
    return float(_norm(tensor))


@dataclass
class _DeltaWriter:
    """A safetensors file whose tensors are written as they come; room for its header was kept."""

    file: BinaryIO
    entries: dict[str, Entry] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    end: int = 0

    def put(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        self.entries[name] = Entry(tensor.dtype, tuple(tensor.shape), self.end)
        if tensor.numel():
            self.file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.end += self.entries[name].size

    def header(self, next_id: int | None) -> bytes:
        """The header of what was put so far."""
        content: dict[str, Any] = {
            "version": VERSION,
            "next_id": next_id,
            "tensors": {name: asdict(stored) for name, stored in self.tensors.items()},
        }
        return encode_header(self.entries, {"format": "pt", FORMAT: json.dumps(content)})


@contextmanager
def _writer(path: Path, names: Sequence[str], vocabulary: VocabularyMap | None) -> Iterator[_DeltaWriter]:
    """A delta file that appears whole or not at all."""
    room = -(-sum(1500 + 8 * len(name.encode()) for name in names) // 8) * 8 + 4096
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(bytes(8 + room))
        writer = _DeltaWriter(file)
        if vocabulary is not None:
            writer.put(_ROWS, vocabulary.base_row)
        yield writer
        text = writer.header(vocabulary.next_id if vocabulary else None)[8:]
        assert len(text) <= room
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text + b" " * (room - len(text)))
        file.flush()
        os.fsync(file.fileno())
