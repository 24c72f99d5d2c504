"""Vectors as large as a layer's MLP, of every language, and their inner products.

In: for one language after another, a tensor for each of the MLPs' matrices. Out: inner products (L, N, N). Squared
norms are taken at once, of every layer; the tensors themselves are kept only for the layers whose languages are to be
compared, in files that live as long as the store, and are read back matrix by matrix. So no checkpoint is kept, nor are
all vectors ever in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import CheckpointReader, write_safetensors
from .blocks import Block

_CHUNK = 1 << 20  # numbers a language turned to fp64 at a time


class VectorStore:
    """A context manager: its files vanish at the end.

    Args:
        blocks: the layers.
        kept: indices of the layers whose vectors are kept.
    """

    def __init__(self, blocks: Sequence[Block], kept: Collection[int]) -> None:
        self.blocks, self.kept = blocks, set(kept)
        self._squares: list[np.ndarray] = []

    def __enter__(self) -> VectorStore:
        self._folder = TemporaryDirectory(prefix="peft_moe_delta_")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, vectors: Iterable[Mapping[str, Tensor]]) -> None:
        """The next language's tensors, by matrix name, one mapping a layer in the order of the blocks."""
        kept: dict[str, Tensor] = {}
        squares = []
        for block, tensors in zip(self.blocks, vectors, strict=True):
            squares.append(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
            if block.index in self.kept:
                kept |= {f"{block.index}.{name}": tensor.cpu() for name, tensor in tensors.items()}
        if kept:
            write_safetensors(self._file(len(self._squares)), kept)
        self._squares.append(np.array(squares))

    def gram(self) -> np.ndarray:
        """Inner products (L, N, N), fp64; NaN off the diagonal of layers that were not kept."""
        languages = len(self._squares)
        result = np.full((len(self.blocks), languages, languages), np.nan)
        readers = [CheckpointReader(self._file(index)) for index in range(languages)] if self.kept else []
        for position, block in enumerate(self.blocks):
            if block.index in self.kept:
                result[position] = sum(
                    _inner_products([reader[f"{block.index}.{name}"] for reader in readers]) for name in block.matrices
                )
            np.fill_diagonal(result[position], [squares[position] for squares in self._squares])
        return result

    def _file(self, language: int) -> Path:
        return Path(self._folder.name) / f"{language}.safetensors"


def _inner_products(tensors: Sequence[Tensor]) -> np.ndarray:
    """(N, N) of N tensors of one shape, summed in fp64."""
    rows = torch.stack([tensor.flatten() for tensor in tensors])
    return np.asarray(sum((part.double() @ part.double().T) for part in rows.split(_CHUNK, dim=1)))
