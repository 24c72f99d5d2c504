"""Tensors by name, wherever they lie, and the sums that adapters and grafts share.

In: a dictionary, a checkpoint's files, or a view of either. Out: one tensor at a time; or its shape and dtype, or a few
of its rows, without reading all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GraftError

BLOCK = 1 << 18
"""Elements that are summed at a time."""
SAMPLED_ROWS = 16
"""Rows that stand for a tensor, evenly spread."""
_EMBEDDING = re.compile(r"(?:embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.(?:weight|bias)$")


class Tensors(Mapping[str, Tensor]):
    """A mapping from name to tensor that can say what a tensor is like before it is read."""

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype without content, on the meta device."""
        tensor = self[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def origin(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        """Where a tensor lies, below any other names that it has, and its name there."""
        return self, name

    def sample(self, name: str) -> Tensor:
        """A few of a tensor's rows (`sampled_rows`)."""
        tensor = self[name]
        return tensor[sampled_rows(len(tensor))] if tensor.dim() else tensor


@dataclass(frozen=True)
class Held(Tensors):
    """Tensors in memory."""

    tensors: Mapping[str, Tensor]

    def origin(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        return self.tensors, name

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


@dataclass(frozen=True)
class View(Tensors):
    """Tensors of other mappings under names of its own.

    Attributes:
        places: name here -> mapping and name there.
    """

    places: Mapping[str, tuple[Tensors, str]]

    def origin(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        tensors, there = self.places[name]
        return tensors.origin(there)

    def __getitem__(self, name: str) -> Tensor:
        tensors, there = self.places[name]
        return tensors[there]

    def meta(self, name: str) -> Tensor:
        tensors, there = self.places[name]
        return tensors.meta(there)

    def sample(self, name: str) -> Tensor:
        tensors, there = self.places[name]
        return tensors.sample(there)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


def held(tensors: Mapping[str, Tensor]) -> Tensors:
    """Any mapping as `Tensors`."""
    return tensors if isinstance(tensors, Tensors) else Held(tensors)


def is_embedding(name: str) -> bool:
    """Whether a tensor has one row a token: an input or output embedding."""
    return _EMBEDDING.search(name) is not None


def sampled_rows(length: int) -> list[int]:
    """The rows that stand for a tensor of that many."""
    count = min(length, SAMPLED_ROWS)
    return [index * length // count for index in range(count)]


@torch.no_grad()
def low_rank_weight(base: Tensor, A: Tensor, B: Tensor, *, transposed: bool = False) -> Tensor:
    """`W_0 + B A`, summed in fp64 and rounded once to the dtype of `W_0`.

    Args:
        base: `W_0`, (out, in), or (in, out) if `transposed` (GPT-2's `Conv1D`).
        A: (rank, in).
        B: (out, rank).

    Raises:
        GraftError: a sum is too large for that dtype, or not finite to begin with.
    """
    left, right = (A.T.double(), B.T.double()) if transposed else (B.double(), A.double())
    weight = torch.empty_like(base)
    if base.is_meta:
        return weight
    rows = max(1, BLOCK // base.shape[1])
    for start in range(0, base.shape[0], rows):
        block = slice(start, start + rows)
        weight[block] = torch.addmm(base[block].double(), left[block], right)
    if not all_finite(weight):
        raise GraftError(
            f"A low-rank expert's weight of shape {tuple(weight.shape)} is not finite in {weight.dtype}. Graft onto a "
            "bf16 or fp32 copy of the post-trained model, or with a smaller expert_scale; if that does not help, the "
            "adapter is damaged."
        )
    return weight


def with_new_rows(embedding: Tensor, new: Tensor, first: int) -> Tensor:
    """An embedding with rows for new tokens, in place of its padding first and then beyond its end.

    Args:
        embedding: (rows, ...).
        new: (tokens, ...), taken in the embedding's dtype.
        first: id of the first new token; at most `rows`.

    Raises:
        GraftError: there would be a gap, the rows are of another width, or too large for the dtype.
    """
    if first > len(embedding) or embedding.shape[1:] != new.shape[1:]:
        raise GraftError(
            f"Cannot put rows of shape {tuple(new.shape)} at {first} into an embedding of shape "
            f"{tuple(embedding.shape)}. They were learnt for another model."
        )
    new = rounded(new.to(embedding.device), embedding.dtype, "The rows of new tokens")
    return torch.cat([embedding[:first], new, embedding[first + len(new) :]])


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A weight in another dtype; as it is where it has that one already.

    Raises:
        GraftError: a number is too large for the dtype, which would make it infinite.
    """
    result = tensor.detach().to(dtype)
    if result.dtype != tensor.dtype and not all_finite(result):
        raise GraftError(
            f"{name} holds numbers up to {tensor.abs().max():.3g}, which {dtype} cannot: it ends at "
            f"{torch.finfo(dtype).max:.3g}. Graft onto a bf16 or fp32 copy of the post-trained model, or a smaller "
            "expert_scale."
        )
    return result


def all_finite(tensor: Tensor) -> bool:
    """Whether every value is finite: the extremes tell, and cost a fraction of looking at each one.

    True of tensors without content (meta), which have no values.
    """
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() == 1:
        return True  # torch knows no extremes of 8-bit numbers
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))
