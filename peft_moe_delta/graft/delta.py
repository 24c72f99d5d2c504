"""What post-training changed in a base model: `Delta = theta_post - theta_base` (ParamDelta, arXiv 2504.21023).

In: the weights of a base model and of its post-trained descendant, as state dicts or as checkpoints. Out: deltas, one
tensor at a time, a report on them, and a file. Both weights are kept, not their difference, because adding a difference
back does not give the post-trained weight bit for bit; grafting copies it instead (`graft_tensor`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointReader, first_few, resolve
from ..errors import GraftError
from ..export.names import DenseNames
from ..tensors import Tensors, View, held, is_embedding
from .dense import Dense, read_config
from .report import DeltaReport, family_of
from .rows import AlignedWeights, VocabularyMap
from .stored import DeltaFile, write_delta

_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class PostTrainingDelta:
    """Base and post-trained weights with the same names and shapes.

    Attributes:
        base: `theta_base` by tensor name, embeddings in the post-trained model's rows; read lazily from files.
        post_trained: `theta_post`, likewise.
        names: the tensors both have, in the base's order. An output embedding that is tied in both is left out.
    """

    base: Tensors
    post_trained: Tensors
    names: tuple[str, ...]

    @classmethod
    def from_checkpoints(
        cls,
        base: str | Path | Mapping[str, Tensor],
        post_trained: str | Path | Mapping[str, Tensor],
        vocabulary: VocabularyMap | None = None,
    ) -> PostTrainingDelta:
        """Pair two checkpoints: folders, Hub ids, or mappings from tensor name to tensor. Reads no tensor from files.

        Args:
            vocabulary: how the rows of their embeddings belong together; None where row r is row r.

        Raises:
            CheckpointError: a folder or repository cannot be read.
            GraftError: names or shapes differ.
        """
        (start, tied), (end, tied_in_end) = weights_of(base), weights_of(post_trained)
        if vocabulary is not None and not vocabulary.is_same:
            start = AlignedWeights(start, end, vocabulary)
        _check_names(start, end)
        names = tuple(
            name
            for name in start
            if name in end
            and not (name in tied and (name in tied_in_end or _is_tied_head(end, name)))
            and not (name in tied_in_end and _is_tied_head(start, name))
        )
        _check_shapes(names, start, end)
        return cls(start, end, names)

    def tensor(self, name: str) -> Tensor:
        """`Delta` of one tensor, fp32.

        Raises:
            GraftError: the delta is not finite.
        """
        base, post_trained = self.base[name], self.post_trained[name]
        wide = torch.promote_types(base.dtype, torch.float32)
        delta = (post_trained.to(wide) - base.to(wide)).float()
        if not delta.isfinite().all():
            raise GraftError(
                f"The post-training delta of {name} has {int((~delta.isfinite()).sum())} values that are not finite. "
                "One of the two checkpoints is damaged or overflows; fetch it again."
            )
        return delta

    def cosine(self, name: str, expert_change: Tensor) -> float:
        """Cosine between `Delta` and an expert's own change `E - W_0` of the same tensor; 0 if either is zero.

        Near -1, grafting undoes what the expert learnt.

        Raises:
            GraftError: shapes differ.
        """
        delta = self.tensor(name)
        if delta.shape != expert_change.shape:
            raise GraftError(
                f"Cannot compare changes of {name}: post-training's has shape {tuple(delta.shape)}, the expert's "
                f"{tuple(expert_change.shape)}. Pass E - W_0 of the same tensor."
            )
        return float(torch.cosine_similarity(delta.double().flatten(), expert_change.double().flatten(), dim=0))

    def report(self) -> DeltaReport:
        """`||Delta||` against `||W_0||` for attention, MLPs, norms and embeddings; reads every tensor once."""
        return DeltaReport.of((name, _square(self.tensor(name)), _square(self.base[name])) for name in self.names)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32, *, rank: int | None = None) -> None:
        """Write the deltas alone to one safetensors file, one tensor at a time; see `stored` for its exactness.

        Args:
            path: the file; it appears whole or not at all.
            dtype: fp32, from which the post-trained weights come back bit for bit, or a 16-bit one.
            rank: of the matrices, by SVD; None for full ones.
        """
        aligned = self.base if isinstance(self.base, AlignedWeights) else None
        base, vocabulary = (aligned.base, aligned.vocabulary) if aligned else (self.base, None)
        write_delta(path, self.names, base, self.post_trained, vocabulary, dtype, rank)

    @classmethod
    def load(cls, path: str | Path, base: str | Path | Mapping[str, Tensor]) -> PostTrainingDelta:
        """Read what `save` wrote, over the base model it was computed from; each tensor is checked as it is used.

        Raises:
            CheckpointError: the file is missing, damaged, no delta, or of another version.
            GraftError: names or shapes differ from the base's; on use, `base` holds other values.
        """
        file, (start, _) = DeltaFile.open(path), weights_of(base)
        return cls.from_checkpoints(start, _Restored(start, file), file.vocabulary)


@dataclass(frozen=True)
class _Restored(Tensors):
    """Post-trained weights made again from a base model and a saved delta, one tensor at a time."""

    base: Tensors
    file: DeltaFile

    def __getitem__(self, name: str) -> Tensor:
        return self.file.restore(name, self.base[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.tensors)

    def __len__(self) -> int:
        return len(self.file.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.file.tensors

    def meta(self, name: str) -> Tensor:
        stored = self.file.tensors[name]
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")


def weights_of(source: str | Path | Mapping[str, Tensor]) -> tuple[Tensors, frozenset[str]]:
    """Tensors by name, and which of them are another one's; a model's by the names that `save_pretrained` gives."""
    if isinstance(source, Mapping):
        return held(source), frozenset()
    folder = resolve(source)
    reader = CheckpointReader(folder)
    if not (folder / "config.json").is_file():
        return reader, frozenset()
    config = read_config(folder)
    dense, on_disk = Dense.of_files(reader, config, folder), DenseNames(config).on_disk
    places = {on_disk(name): (dense.tensors, name) for name in dense.tensors}
    return View(places), frozenset(map(on_disk, dense.tied))


def _check_names(base: Tensors, post_trained: Tensors) -> None:
    """Refuse names that only one side has, but for a tied output embedding: files may hold it once or twice."""
    only_base, only_post = (
        [name for name in ours if name not in theirs and not _is_tied_head(ours, name)]
        for ours, theirs in ((base, post_trained), (post_trained, base))
    )
    if only_base or only_post:
        raise GraftError(
            f"The checkpoints are of different models. Only the base has {first_few(only_base)}; only the post-trained "
            f"one has {first_few(only_post)}. A delta needs a base model and its own descendant, in the same format."
        )


def _is_tied_head(weights: Tensors, name: str) -> bool:
    """Whether a tensor is the output embedding and a copy of the input embedding."""
    if not name.endswith(_HEADS):
        return False
    others = [weights[other] for other in weights if is_embedding(other) and other != name]
    return any(torch.equal(embedding, weights[name]) for embedding in others)


def _check_shapes(names: tuple[str, ...], base: Tensors, post_trained: Tensors) -> None:
    """Refuse shapes that differ, and say so plainly when only the vocabulary does."""
    shapes = {name: tuple(tuple(side.meta(name).shape) for side in (base, post_trained)) for name in names}
    different = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if not different:
        return
    rows = {(ours[0], theirs[0]) for ours, theirs in different.values() if ours[1:] == theirs[1:]}
    if len(rows) == 1 and all(family_of(name) == "embeddings" for name in different):
        ours, theirs = rows.pop()
        raise GraftError(
            f"The vocabularies differ: the base has {ours} tokens, the post-trained model {theirs} "
            f"({first_few(different)}). Rows belong together by token, not by number: pass both as folders or "
            "Hub ids with their tokenizers, or a VocabularyMap."
        )
    listed = [f"{name} {ours} and {theirs}" for name, (ours, theirs) in different.items()]
    raise GraftError(
        f"Shapes differ, base and post-trained: {first_few(listed)}. A delta needs a base model and its own descendant."
    )


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
