"""`LanguageStatistics`: what was measured of a model, language by language and layer by layer.

In: one vector a language and layer, of four sources. Out: a readable JSON file, and the figures that allocation and
grouping ask for. Every source is kept as inner products alone: `grams[source][layer, a, b]` is the inner product of the
vectors of languages a and b in that layer. Norms and cosines, of one layer or of several concatenated, follow from
those, so no vector as large as a model is ever stored.

Shapes: L layers, N languages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, LanguageError

SOURCES: Mapping[str, str] = {
    "similarity": "mean unit vector of the tokens at the MLP's input (LayerMoE)",
    "deviation": "change of the MLP's matrices after a few steps of tuning on the language alone (DMoE)",
    "gradients": "mean gradient of the MLP's matrices (GradSim)",
    "representations": "mean hidden state behind the layer (Representation Sprachbund)",
}
"""Source -> the vector whose inner products are kept."""

LAST_LAYERS = 3
"""How many layers DMoE groups languages by: the last ones."""

_DIGITS = 8  # significant ones in the file


@dataclass(frozen=True, eq=False)
class LanguageStatistics:
    """Inner products of the languages' vectors in every layer.

    Attributes:
        languages: language codes, in the order of the matrices.
        layers: indices of the decoder layers, ascending.
        grams: source (one of `SOURCES`) -> inner products (L, N, N), fp64; off the diagonal NaN in a layer whose
            vectors were not kept.
        model: `name`, and the sizes `hidden_size` and `expert_params` (of one MLP).
        settings: source -> what it was measured on and how.
    """

    languages: tuple[str, ...]
    layers: tuple[int, ...]
    grams: Mapping[str, np.ndarray]
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.languages), len(self.languages))
        if len(self.languages) < 2 or len(set(self.languages)) < len(self.languages):
            raise DataError(f"statistics: got the languages {list(self.languages)}, expected two or more, each once.")
        for source, gram in self.grams.items():
            if source not in SOURCES:
                raise DataError(f"statistics: got the source {source!r}, expected some of: {', '.join(SOURCES)}.")
            if gram.shape != shape or not (np.isfinite(gram) | _unknown(gram)).all():
                raise DataError(
                    f"statistics: {source} holds numbers of shape {gram.shape}, expected finite ones of shape {shape}: "
                    "layers, languages, languages. Measure the languages together, on one model."
                )

    def deviation(self) -> dict[str, np.ndarray]:
        """Language -> norm of the MLP's change in each layer, (L,)."""
        norms = np.sqrt(np.einsum("lnn->nl", self._gram("deviation")))
        return dict(zip(self.languages, norms, strict=True))

    def similarity(self, new: Sequence[str], original: Sequence[str] = ()) -> np.ndarray:
        """LayerMoE's similarity of each layer, (L,): the mean of the new-new and of the new-original average.

        Of either kind that has no pair (one new language; no original one) the other stands alone.

        Raises:
            LanguageError: a language that was not measured, or fewer than one pair.
        """
        gram, rows, columns = self._gram("similarity"), self._index(new), self._index(original)
        pairs = [gram[:, a, b] for i, a in enumerate(rows) for b in rows[i + 1 :]]
        kinds = [np.mean(pairs, axis=0)] if pairs else []
        if rows and columns:
            kinds.append(gram[:, rows][:, :, columns].mean(axis=(1, 2)))
        if not kinds:
            raise LanguageError(
                f"Similarity needs two new languages, or a new and an original one; got new {list(new)} and original "
                f"{list(original)}. Measure at least two languages, and say which are new."
            )
        return np.mean(kinds, axis=0)

    def between_languages(
        self, source: str = "deviation", layers: Sequence[int] | None = None
    ) -> dict[str, dict[str, float]]:
        """Cosines of the languages' vectors, concatenated over `layers`, as `{language: {language: cosine}}`.

        By default all layers that tell; for `"deviation"` the last three, as DMoE has it.

        Raises:
            DataError: a source that was not measured, layers that were not or whose vectors were not kept, or a vector
                of zero length.
        """
        gram = self._gram(source)
        telling = [layer for layer, matrix in zip(self.layers, gram, strict=True) if np.isfinite(matrix).all()]
        if layers is None:
            layers = telling[-LAST_LAYERS:] if source == "deviation" else telling
        if not layers or set(layers) - set(telling):
            raise DataError(
                f"layers: got {list(layers)}, expected some of {telling}, whose vectors of {source} were kept. "
                "For others, measure again with more vector_layers."
            )
        summed = gram[[self.layers.index(layer) for layer in layers]].sum(axis=0)
        norms = np.sqrt(np.diag(summed))
        if not (norms > 0).all():
            still = [code for code, norm in zip(self.languages, norms, strict=True) if not norm > 0]
            raise DataError(f"{source}: the vectors of {still} are zero, so they have no direction. Measure again.")
        cosines = np.clip(summed / np.outer(norms, norms), -1.0, 1.0)
        np.fill_diagonal(cosines, 1.0)
        rows = (dict(zip(self.languages, row.tolist(), strict=True)) for row in cosines)
        return dict(zip(self.languages, rows, strict=True))

    def table(self) -> str:
        """Markdown: of each layer the mean similarity of two languages, and the deviations."""
        head, columns = ["layer"], [list(map(str, self.layers))]
        if "similarity" in self.grams:
            pairs = np.triu_indices(len(self.languages), 1)
            head.append("similarity")
            columns.append([f"{matrix[pairs].mean():.4f}" for matrix in self.grams["similarity"]])
        if "deviation" in self.grams:
            deviations = self.deviation()
            head += [f"deviation {code}" for code in deviations]
            columns += [[f"{value:.3g}" for value in column] for column in deviations.values()]
        rows = [head, ["---", *["---:"] * (len(head) - 1)], *zip(*columns, strict=True)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def merged(self, other: LanguageStatistics) -> LanguageStatistics:
        """These statistics and another's, which replace these where both have a source.

        Raises:
            DataError: they are of other layers or languages, or of another model.
        """
        for name in ("languages", "layers"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(
                    f"statistics of {name} {list(getattr(self, name))} and {list(getattr(other, name))} do not go "
                    "together. Measure the same languages on the same model."
                )
        if dict(self.model) != dict(other.model):
            raise DataError(f"statistics of two models do not go together: {dict(self.model)} and {dict(other.model)}.")
        return LanguageStatistics(
            self.languages,
            self.layers,
            {**self.grams, **other.grams},
            self.model,
            {**self.settings, **other.settings},
        )

    def to_json(self) -> str:
        """The statistics as JSON, a matrix row a line, to eight digits."""
        head = {"languages": self.languages, "layers": self.layers, "model": self.model, "settings": self.settings}
        parts = [f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in head.items()]
        for source, gram in self.grams.items():
            matrices = (",\n  ".join(json.dumps(_rounded(row)) for row in matrix) for matrix in gram)
            parts.append(f'"{source}": [\n [' + "],\n [".join(matrices) + "]\n]")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> LanguageStatistics:
        """Read what `to_json` wrote.

        Raises:
            DataError: the document is not such a file, or its parts do not fit together.
        """
        try:
            data = json.loads(text)
            grams = {source: np.array(data[source], dtype=np.float64) for source in SOURCES if source in data}
            languages, layers = tuple(data["languages"]), tuple(data["layers"])
            return cls(languages, layers, grams, data.get("model", {}), data.get("settings", {}))
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"Not language statistics: {error!r}. Expected what `measure` writes.") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LanguageStatistics:
        """Read the JSON file.

        Raises:
            DataError: there is none, or it holds something else.
        """
        return cls.from_json(read_text(path))

    def _gram(self, source: str) -> np.ndarray:
        if source not in self.grams:
            raise DataError(
                f"These statistics have no {source!r}, only: {', '.join(self.grams) or 'nothing'}. "
                f"Measure it: peft-moe-delta measure --sources {source}."
            )
        return self.grams[source]

    def _index(self, codes: Sequence[str]) -> list[int]:
        unknown = [code for code in codes if code not in self.languages]
        if unknown:
            raise LanguageError(f"{unknown} were not measured; the statistics have {', '.join(self.languages)}.")
        return [self.languages.index(code) for code in codes]


def read_text(path: str | Path) -> str:
    """A text file.

    Raises:
        DataError: there is none, or it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}. Check the path.") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file beside its place, then move it there: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _unknown(gram: np.ndarray) -> np.ndarray:
    """Where a number may be missing: off the diagonal of a layer that has none there."""
    off = ~np.eye(gram.shape[-1], dtype=bool)
    return np.asarray(off & np.isnan(gram[:, off]).all(axis=1)[:, None, None])


def _rounded(row: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.{_DIGITS}g}") for value in row]
