"""`group_languages`: which languages share experts.

In: how alike languages are, from any source. Out: `LanguageGroups`, in the order they were found. The procedure is
DMoE's balanced complete linkage (arXiv 2506.12388): with distance 1 - similarity, take the languages of the smallest
diameter as a group, remove them, repeat; group sizes are n // k. Here k need not divide n (sizes then differ by one,
the larger groups first, so that what is left over is what has no close company), and sizes may also be left to the data
within bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError, LanguageError
from ..files import read_text, write_text
from ..languages import ORIGINAL_GROUP
from .cliques import EXACT_UP_TO, tightest

SYMMETRY_TOLERANCE = 1e-5
KEPT_SHARE = 0.8
"""How many of the languages a resample keeps."""


@dataclass(frozen=True, eq=False)
class LanguageGroups:
    """Groups of languages.

    Attributes:
        groups: the languages of each group, in the order the groups were found.
        diameters: the largest distance (1 - similarity) within each group; 0 for one language.
        stability: share of pairs of languages that stay together, or apart, when a fifth of the languages is left out;
            mean over resamples, 1 if nothing ever changes.
        chance: the same share if the groups of the resamples were drawn at random.
        languages: all languages, in the order of the matrix.
        similarity: the matrix they were grouped by, (N, N).
        original: languages of the group `"original"`, which the base model speaks; not grouped.
    """

    groups: tuple[tuple[str, ...], ...]
    diameters: tuple[float, ...]
    stability: float
    chance: float
    languages: tuple[str, ...]
    similarity: np.ndarray
    original: tuple[str, ...] = ()

    def as_languages(self) -> dict[str, str]:
        """Code -> group for `MoeDeltaConfig`: `"expanded_1"` ... in the order found, and `"original"`."""
        grouped = {code: f"expanded_{i}" for i, group in enumerate(self.groups, start=1) for code in group}
        return {**dict.fromkeys(self.original, ORIGINAL_GROUP), **grouped}

    def table(self) -> str:
        """Markdown: each group's languages and diameter, and the stability."""
        lines = ["| group | languages | diameter |", "| --- | --- | ---: |"]
        for i, (group, diameter) in enumerate(zip(self.groups, self.diameters, strict=True), start=1):
            lines.append(f"| expanded_{i} | {' '.join(group)} | {diameter:.3f} |")
        lines += ["", f"Stability {self.stability:.2f} (1 if nothing changes, {self.chance:.2f} by chance)."]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The groups as JSON that `from_json` reads back."""
        rows = dict(zip(self.languages, self.similarity.tolist(), strict=True))
        head = {name: getattr(self, name) for name in ("groups", "original", "diameters", "stability", "chance")}
        parts = [f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in head.items()]
        matrix = ",\n ".join(f"{json.dumps(code, ensure_ascii=False)}: {json.dumps(row)}" for code, row in rows.items())
        return "{\n" + ",\n".join(parts) + ',\n"similarity": {\n ' + matrix + "\n}\n}\n"

    @classmethod
    def from_json(cls, text: str) -> LanguageGroups:
        """Read what `to_json` wrote.

        Raises:
            DataError: the document is something else.
        """
        try:
            data = json.loads(text)
            rows = data["similarity"]
            return cls(
                tuple(tuple(group) for group in data["groups"]),
                tuple(data["diameters"]),
                data["stability"],
                data["chance"],
                tuple(rows),
                np.array(list(rows.values()), dtype=np.float64),
                tuple(data["original"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"Not language groups: {error!r}. Expected what `group` writes.") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LanguageGroups:
        """Read the JSON file.

        Raises:
            DataError: there is none, or it holds something else.
        """
        return cls.from_json(read_text(path))


def group_languages(
    similarity: Mapping[str, Mapping[str, float]] | ArrayLike,
    languages: Sequence[str] | None = None,
    *,
    num_groups: int | None = None,
    sizes: tuple[int, int] | None = None,
    original: Sequence[str] = (),
    exact_up_to: int = EXACT_UP_TO,
    resamples: int = 100,
    seed: int = 0,
) -> LanguageGroups:
    """Group languages by balanced complete linkage.

    Args:
        similarity: `{language: {language: similarity}}`, as `LanguageStatistics.between_languages` gives it; or a
            symmetric (N, N) matrix with `languages`.
        languages: the matrix's languages, in order; of a mapping, those to group (all by default).
        num_groups: how many groups, of equal size but for one.
        sizes: fewest and most languages of a group, whose number may then differ. A group starts with the fewest and
            takes in the nearest language as long as that has no closer group to find among those left. With
            `num_groups`, exactly so many groups within those sizes.
        original: languages that the base model speaks; they are not grouped, but go along as the group `"original"`.
        exact_up_to: so many languages or fewer are searched for the smallest diameter of all; more are grown greedily
            from the closest pair.
        resamples: draws for the stability figure; 0 leaves it out (NaN).
        seed: of the draws.

    Ties fall to the languages that come first.

    Raises:
        DataError: a matrix that is not square, symmetric and finite, or does not fit `languages`.
        LanguageError: fewer than two languages, or sizes that they cannot be cut into.
    """
    codes, matrix = _named_matrix(similarity, languages)
    if both := sorted(set(original) & set(codes)):
        raise LanguageError(f"{both} are to be grouped and original too. Leave them out of `languages`.")
    _check_sizes(len(codes), num_groups, sizes)
    distance = 1 - matrix
    np.fill_diagonal(distance, 0.0)
    if sizes is not None:
        members = _fitted(distance, num_groups, *sizes, exact_up_to)
    else:
        members = _cut(distance, _even_sizes(len(codes), num_groups or 1), exact_up_to)
    stability, chance = _stability(distance, members, exact_up_to, resamples, seed)
    return LanguageGroups(
        groups=tuple(tuple(codes[i] for i in sorted(group)) for group in members),
        diameters=tuple(float(distance[np.ix_(group, group)].max()) for group in members),
        stability=stability,
        chance=chance,
        languages=codes,
        similarity=matrix,
        original=tuple(original),
    )


def _cut(distance: np.ndarray, sizes: Sequence[int], exact_up_to: int) -> list[list[int]]:
    """Indices of groups of given sizes: the tightest of the first size, of what is left the tightest of the next."""
    left, groups = list(range(len(distance))), []
    for size in sizes:
        group = [left[i] for i in tightest(distance[np.ix_(left, left)], size, exact_up_to)]
        groups.append(group)
        left = [index for index in left if index not in group]
    return groups


def _even_sizes(number: int, num_groups: int) -> list[int]:
    """DMoE's n // k languages a group; where k does not divide n, one more in the first ones.

    A smaller set of a tight group has a diameter no larger than the whole group's: were small groups cut first, they
    would be cut out of tight ones, and a group of one would be whoever comes first.
    """
    return [(number + index) // num_groups for index in reversed(range(num_groups))]


def _fitted(distance: np.ndarray, num_groups: int | None, fewest: int, most: int, exact_up_to: int) -> list[list[int]]:
    """Indices of groups whose sizes the distances decide, within bounds."""
    left = list(range(len(distance)))
    groups: list[list[int]] = []
    while left:
        still = None if num_groups is None else num_groups - len(groups)
        start, enough = _feasible_sizes(len(left), still, fewest, most)
        inner = distance[np.ix_(left, left)]
        group = _widened(inner, tightest(inner, start, exact_up_to), enough, still, fewest, most)
        groups.append([left[i] for i in group])
        left = [index for i, index in enumerate(left) if i not in group]
    return groups


def _widened(
    distance: np.ndarray, group: list[int], enough: int, still: int | None, fewest: int, most: int
) -> list[int]:
    """A group with further languages, each the nearest, while it has no closer group or must be taken in."""
    group, fitting = list(group), group
    while len(group) < enough:
        outside = [i for i in range(len(distance)) if i not in group]
        far = distance[np.ix_(outside, group)].max(axis=1)
        nearest = outside[int(far.argmin())]
        others = np.sort(distance[nearest, [i for i in outside if i != nearest]])
        company = max(1, fewest - 1)
        if len(others) >= company and others[company - 1] < far.min():
            break
        group.append(nearest)
        if _divisible(len(distance) - len(group), None if still is None else still - 1, fewest, most):
            fitting = list(group)
    return fitting


def _feasible_sizes(left: int, still: int | None, fewest: int, most: int) -> tuple[int, int]:
    """Fewest and most languages of the next group that leave a number which can be cut up in its turn.

    A pair is the smallest start, where it fits: every single language is as tight as any other.
    """
    after = None if still is None else still - 1
    fitting = [size for size in range(fewest, min(most, left) + 1) if _divisible(left - size, after, fewest, most)]
    return fitting[fitting[0] == 1 < len(fitting)], fitting[-1]


def _divisible(number: int, groups: int | None, fewest: int, most: int) -> bool:
    """Whether a number can be cut into groups (so many, or any number of them) of allowed sizes."""
    if groups is None:
        groups = -(-number // most)  # the fewest groups that hold them all
    return groups * fewest <= number <= groups * most


def _check_sizes(number: int, num_groups: int | None, sizes: tuple[int, int] | None) -> None:
    """Refuse groups that so many languages cannot be cut into."""
    if num_groups is None and sizes is None:
        raise LanguageError("Say how to group: num_groups=3, or sizes=(2, 4), fewest and most languages of a group.")
    if num_groups is not None and not 1 <= num_groups <= number:
        raise LanguageError(f"num_groups: got {num_groups}, expected 1 to {number}, the number of languages.")
    if sizes is not None and not (1 <= sizes[0] <= sizes[1] and _divisible(number, num_groups, *sizes)):
        into = "" if num_groups is None else f"{num_groups} "
        raise LanguageError(
            f"{number} languages cannot be cut into {into}groups of {sizes[0]} to {sizes[1]}. Widen sizes."
        )


def _stability(
    distance: np.ndarray, members: list[list[int]], exact_up_to: int, resamples: int, seed: int
) -> tuple[float, float]:
    """How often pairs of languages keep together or apart when some languages are left out, and by chance.

    Those that are kept are grouped anew in the sizes that their groups still have, the largest first: so clear groups
    are found again whoever is left out, and only unclear ones change.
    """
    label = np.empty(len(distance), dtype=int)
    for index, group in enumerate(members):
        label[group] = index
    keep = max(2, round(KEPT_SHARE * len(distance)))
    rng = np.random.default_rng(seed)
    agreement, expected = [], []
    for _ in range(resamples):
        kept = np.sort(rng.choice(len(distance), size=keep, replace=False))
        sizes = sorted(np.unique(label[kept], return_counts=True)[1].tolist(), reverse=True)
        again = np.empty(keep, dtype=int)
        for index, group in enumerate(_cut(distance[np.ix_(kept, kept)], sizes, exact_up_to)):
            again[group] = index
        pairs = np.triu_indices(keep, 1)
        before, after = (np.equal.outer(labels, labels)[pairs] for labels in (label[kept], again))
        agreement.append(np.mean(before == after))
        expected.append(before.mean() * after.mean() + (1 - before.mean()) * (1 - after.mean()))
    if not agreement:
        return float("nan"), float("nan")
    return float(np.mean(agreement)), float(np.mean(expected))


def _named_matrix(similarity: Any, languages: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Languages and their matrix, checked."""
    if isinstance(similarity, Mapping):
        codes = tuple(similarity if languages is None else languages)
        try:
            rows: Any = [[similarity[a][b] for b in codes] for a in codes]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"similarity: {error!r}, expected a number for every pair of {', '.join(map(str, codes))}."
            ) from error
    elif languages is None:
        raise DataError("similarity: got a matrix without names. Give `languages`, in the order of its rows.")
    else:
        codes, rows = tuple(languages), similarity
    try:
        matrix = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"similarity: expected a number for every pair of languages; {error}.") from error
    if len(codes) < 2 or len(set(codes)) < len(codes):
        raise LanguageError(f"languages: got {list(codes)}, expected at least two, each once.")
    if matrix.shape != (len(codes), len(codes)) or not np.isfinite(matrix).all():
        raise DataError(
            f"similarity: got shape {matrix.shape}, expected finite numbers of shape {(len(codes),) * 2}: a row and a "
            "column for each language."
        )
    for a, b in combinations(range(len(codes)), 2):
        if abs(matrix[a, b] - matrix[b, a]) > SYMMETRY_TOLERANCE * max(1.0, abs(matrix[a, b])):
            raise DataError(
                f"similarity is not symmetric: {codes[a]}-{codes[b]} is {matrix[a, b]:.6g}, {codes[b]}-{codes[a]} "
                f"{matrix[b, a]:.6g}. Average the two, (m + m.T) / 2, if either stands for both."
            )
    return codes, (matrix + matrix.T) / 2
