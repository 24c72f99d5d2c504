"""The header of a safetensors file: read as if it came from an enemy, written so that any reader takes it.

A file is eight bytes with the header's length, the header (JSON: tensor name -> dtype, shape, place), and the tensors'
bytes without gap. In: a path, or names with dtypes and shapes. Out: a `Header`, or the bytes of one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
_MAX_BYTES = 2**62
"""A tensor of more is absurd, also if one of its dimensions is 0."""

DTYPES = {
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        dtype: one of `DTYPES`.
        shape: its dimensions.
        start: its first byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file holds: entries by tensor name in the header's order, and further strings."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


class _Bad(ValueError):
    """What is wrong with a header."""


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: the file is missing or truncated; the header is no JSON of the format, names a tensor twice,
            or places tensors outside the file, over each other or with gaps.
    """
    try:
        with path.open("rb", buffering=0) as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(MAX_HEADER, total - 8):
                raise _Bad(f"its header should have {length:,} bytes" if total >= 8 else "it has no header")
            return _parse(file.read(length), 8 + length, total)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Fetch the checkpoint again.") from error
    except (_Bad, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}. It is truncated or "
            "damaged; fetch it again."
        ) from error


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file, padded to a multiple of 8 bytes; `Entry.start` counts from its end here."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        offsets = [entry.start, entry.start + entry.size]
        content[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unique_json(text: str | bytes) -> Any:
    """Parse JSON that names nothing twice: readers differ in which of two they take.

    Raises:
        ValueError: not JSON, a key given twice, or a text that is no text (half of a surrogate pair).
    """
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()
        if key in result:
            raise _Bad(f"{key!r} is given twice")
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise _Bad(f"{name} is no JSON")


def _parse(text: bytes, data: int, total: int) -> Header:
    if not text.startswith(b"{"):
        raise _Bad("its header is no JSON object")
    content = unique_json(text.decode("utf-8"))
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("its metadata are no strings")
    entries = {name: _entry(name, fields, data) for name, fields in content.items()}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise _Bad(f"{name!r} starts at byte {entry.start:,}, the tensor before it ends at {end:,}")
        end += entry.size
    if end != total:
        raise _Bad(f"its tensors end at byte {end:,}")
    return Header(entries, metadata)


def _entry(name: str, fields: Any, data: int) -> Entry:
    """One tensor's entry, checked on its own."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _Bad(f"the entry of {name!r} is not dtype, shape and data_offsets")
    kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise _Bad(f"shape and data_offsets of {name!r} must be whole numbers")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _Bad(f"{name!r} is stored as {kind}; can read {', '.join(DTYPES)}. Use an unquantised checkpoint")
    dtype = DTYPES[kind]
    if len(offsets) != 2 or len(shape) > 64 or math.prod(max(n, 1) for n in shape) * dtype.itemsize > _MAX_BYTES:
        raise _Bad(f"{name!r} has the absurd shape {shape} or offsets {offsets}")
    entry = Entry(dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != entry.size:
        raise _Bad(f"{name!r} of shape {shape} in {kind} has {offsets[1] - offsets[0]:,} bytes")
    return entry
