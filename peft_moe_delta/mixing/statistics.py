"""`RouterStatistics`: what closed-form routers are made of, and the systems that are solved for them.

In: sums of router inputs, language by language. Out: rows; and a file that a later fit adds languages to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointReader, write_safetensors
from ..errors import CheckpointError, DataError

FORMAT = "peft-moe-delta router statistics"


@dataclass
class RouterStatistics:
    """What closed-form routers are made of, for every router of a model.

    Attributes:
        A: module name -> (D, D), fp64.
        b: module name -> group -> (D,), fp64.
        languages: the languages they were taken from, in order.
    """

    A: dict[str, Tensor] = field(default_factory=dict, repr=False)
    b: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    languages: list[str] = field(default_factory=list)

    def add(self, language: str, group: str, sums: Mapping[str, tuple[Tensor, Tensor]], tokens: float) -> None:
        """Add a language: for every router `sum x x^T` and `sum x` over its tokens, which the sums are divided by."""
        for name, (outer, total) in sums.items():
            # An earlier fit may have been read from a file, onto another device.
            self.A[name] = self.A.get(name, torch.zeros_like(outer)).to(outer.device) + outer / tokens
            columns = self.b[name] = {g: kept.to(total.device) for g, kept in self.b.get(name, {}).items()}
            columns[group] = columns.get(group, torch.zeros_like(total)) + total / tokens
        self.languages.append(language)

    def joined(self, other: RouterStatistics, weight: float = 1.0) -> RouterStatistics:
        """These sums and `weight` times another's."""
        joined = RouterStatistics(dict(self.A), {n: dict(b) for n, b in self.b.items()}, list(self.languages))
        for name, outer in other.A.items():
            joined.A[name] = joined.A.get(name, torch.zeros_like(outer)) + weight * outer
        for name, columns in other.b.items():
            mine = joined.b.setdefault(name, {})
            for group, total in columns.items():
                mine[group] = mine.get(group, torch.zeros_like(total)) + weight * total
        joined.languages += other.languages
        return joined

    def solve(
        self, name: str, sets: Mapping[str, Iterable[str]], ridge: float, together: bool = False
    ) -> dict[str, Tensor]:
        """Columns of `(A + ridge tr(A)/D I)^-1 b`, of unit norm.

        Args:
            name: the router's module name.
            sets: column -> groups whose tokens belong to it.
            ridge: relative to the mean of A's diagonal.
            together: scale all columns alike, to a mean norm of 1, which leaves their order at every token as it was.
        """
        A, b, nothing = self.A[name], self.b[name], torch.zeros_like(self.A[name][0])
        targets = torch.stack([sum((b.get(g, nothing) for g in groups), nothing) for groups in sets.values()], dim=1)
        columns = _solve(A, targets, ridge)
        norms = columns.norm(dim=0)
        columns = columns / (norms.mean() if together else norms).clamp(min=1e-12)
        return dict(zip(sets, columns.T, strict=True))

    def solve_beside(self, name: str, groups: Iterable[str], offset: Tensor, margin: float, ridge: float) -> Tensor:
        """`(A + ridge tr(A)/D I)^-1 (c + margin (b_own - b_others))`, with `c` the offset: one row beside others."""
        own, b = set(groups), self.b[name]
        signed = sum((b[g] if g in own else -b[g] for g in b), torch.zeros_like(offset))
        return _solve(self.A[name], offset + margin * signed, ridge)

    def discriminant(
        self, name: str, above: Mapping[str, int], below: Mapping[str, int], ridge: float, odds: float = 1.0
    ) -> Tensor:
        """Weights and bias, (D + 1,), of the linear discriminant between groups' means, 0 half-way between them.

        Args:
            name: the router's module name.
            above, below: group -> how many of its languages are in the sums, for either side.
            ridge: relative to the mean of the covariance's diagonal.
            odds: how many times as much an error above weighs as one below, which moves the 0 towards the means below.
        """
        b, everything = self.b[name], len(self.languages)
        u, v = (torch.stack([b[g] for g in side]).sum(0) / sum(side.values()) for side in (above, below))
        mean = torch.stack(list(b.values())).sum(0) / everything
        w = _solve(self.A[name] / everything - mean.outer(mean), u - v, ridge)
        # The prior term of linear discriminant analysis, in which covariance is that within the classes: C holds the
        # distance of their means as well, so that a logit here is 1 - w (u - v) / 4 of one there.
        prior = math.log(odds) * (1 - w @ (u - v) / 4).clamp(min=0)
        return torch.cat([w, (prior - w @ (u + v) / 2)[None]])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {f"{name}.A": A for name, A in self.A.items()}
        tensors |= {f"{name}.b.{group}": v for name, columns in self.b.items() for group, v in columns.items()}
        write_safetensors(path, tensors, {FORMAT: json.dumps({"languages": self.languages})})

    @classmethod
    def load(cls, path: str | Path) -> RouterStatistics:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or something else.
        """
        reader = CheckpointReader(path)
        if FORMAT not in reader.metadata:
            raise CheckpointError(f"{path} holds no router statistics: its header has no {FORMAT!r}.")
        try:
            read = cls(languages=[str(code) for code in json.loads(reader.metadata[FORMAT])["languages"]])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged: its header names no languages. Fit the routers again."
            ) from error
        for key in reader:
            if key.endswith(".A"):
                read.A[key.removesuffix(".A")] = reader[key]
            else:
                name, _, group = key.rpartition(".b.")
                read.b.setdefault(name, {})[group] = reader[key]
        return read


def _solve(matrix: Tensor, target: Tensor, ridge: float) -> Tensor:
    """`(M + ridge tr(M)/D I)^-1 target`."""
    size = len(matrix)
    damping = ridge * matrix.trace() / size * torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    solution, singular = torch.linalg.solve_ex(matrix + damping, target)
    if singular:
        raise DataError(
            "The router inputs of all texts are the same, so nothing tells their languages apart. Give more text of "
            "each."
        )
    return solution
