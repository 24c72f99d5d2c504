"""The committed scores as arrays: what tables and pictures are made from, without a model.

In: the folder of JSON files. Out: `Results`, whose figures are arrays of shape (1 + resamples, seeds).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pairs import ENGLISH

from peft_moe_delta.errors import DataError

from .curves import area, frontier, gain_at
from .intervals import RESAMPLES, document_weights
from .material import PAIRS, UNNAMED, codes_of, digest_of
from .methods import METHODS

DOCUMENTS = "documents.json"
ANCHOR = "post-trained"
RETENTION = {"en": "English text", "skill": "English questions"}
GAIN = {"new": "new languages' text", "new skill": "questions in new languages"}
AXES = [(kept, gained) for gained in GAIN for kept in RETENTION]
LOWEST = {"en": -0.1, "skill": -0.1}
"""How much may be lost at most, bits per byte or share of the questions, where gains are averaged."""


@dataclass(frozen=True)
class Setting:
    """What runs have in common that are compared: a pair and a number of steps."""

    pair: str
    steps: int

    def run(self, method: str) -> tuple[str, int]:
        """A method, and the steps that it takes here."""
        return method, self.steps if METHODS[method].trains else 0

    def __str__(self) -> str:
        return f"{self.pair}, {self.steps} steps"


@dataclass(frozen=True)
class Scored:
    """One run's measures, higher is better, less the post-trained model's of the same pair.

    Attributes:
        record: the JSON.
        test: measure -> (1 + resamples, points), of the points that were tested.
        validation: measure -> (points,), likewise.
        chosen: the point that validation chose, as an index into these.
        other: measure -> (1 + resamples,) on the other domain's text at the chosen point.
        anchored: whether the first point is the post-trained model, which a share of 0 gives.
    """

    record: Mapping[str, Any]
    test: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    chosen: int
    other: Mapping[str, np.ndarray]
    anchored: bool

    def on_frontier(self, kept: str, gained: str) -> tuple[np.ndarray, np.ndarray]:
        """Test scores of the points that validation puts on the frontier, in order: kept and gained, (R, points).

        The post-trained model is always one of them, where there is a way to it: a user who wants to lose nothing takes
        it, also where validation says that another point loses nothing and gains.
        """
        points = frontier(self.validation[kept], self.validation[gained])
        if self.anchored and 0 not in points:
            points = np.concatenate([[0], points])
        return self.test[kept][:, points], self.test[gained][:, points]

    def area(self, kept: str, gained: str) -> np.ndarray:
        """The mean gain where at most `LOWEST` is lost, (R,)."""
        return area(*self.on_frontier(kept, gained), LOWEST[kept])

    def gain_at(self, kept: str, gained: str, level: float) -> np.ndarray:
        return gain_at(*self.on_frontier(kept, gained), level)

    def kept_at(self, kept: str, gained: str, level: float) -> np.ndarray:
        """The mirror image: the most kept where at least so much is gained."""
        kept_RP, gained_RP = self.on_frontier(kept, gained)
        return gain_at(gained_RP, kept_RP, level)


@dataclass(frozen=True)
class Results:
    """All runs of a folder.

    Attributes:
        runs: for each pair of models, `(pair, seed, digest)`, what was run on it: `(method, steps)` -> the JSON. On
            another processor the same seed makes another pair, with another digest; what is compared is of one.
        sizes: bytes of every held-out document, by part and language.
    """

    runs: Mapping[tuple[str, int, str], Mapping[tuple[str, int], Mapping[str, Any]]]
    sizes: Mapping[str, Mapping[str, Sequence[int]]]
    _scored: dict[Any, Scored] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """
        Raises:
            DataError: runs of other documents.
        """
        runs: dict[tuple[str, int, str], dict[tuple[str, int], Mapping[str, Any]]] = {}
        for file in sorted(folder.glob("*/*.json")):
            if file.parent.name == "rates":
                continue
            one = json.loads(file.read_text(encoding="utf-8"))
            models = one["pair"], one["seed"], one["pair_digest"]
            runs.setdefault(models, {})[one["method"], one["steps"]] = one
        sizes = json.loads((folder / DOCUMENTS).read_text(encoding="utf-8")) if runs else {}
        if any(one["text_digest"] != digest_of(sizes) for found in runs.values() for one in found.values()):
            raise DataError(f"{folder}: runs scored other documents than {DOCUMENTS} names. Delete them, run again.")
        return cls(runs, sizes)

    @property
    def settings(self) -> list[Setting]:
        """Pairs and steps with at least one trained method."""
        found = {
            Setting(pair, steps)
            for (pair, _, _), found in self.runs.items()
            for method, steps in found
            if METHODS[method].trains
        }
        return sorted(found, key=lambda setting: (list(PAIRS).index(setting.pair), setting.steps))

    def methods(self, setting: Setting) -> list[str]:
        """Those that were run on any pair of models."""
        found = [found for (pair, _, _), found in self.runs.items() if pair == setting.pair]
        return [method for method in METHODS if any(setting.run(method) in one for one in found)]

    def models(self, setting: Setting) -> dict[int, tuple[str, int, str]]:
        """By seed a pair of models on which every method of the setting was run, where there is one."""
        wanted = {setting.run(method) for method in self.methods(setting)}
        whole = [key for key, found in self.runs.items() if key[0] == setting.pair and wanted <= found.keys()]
        return {seed: (pair, seed, digest) for pair, seed, digest in sorted(whole)}

    def seeds(self, setting: Setting) -> list[int]:
        """Seeds for which every method of the setting is there."""
        return list(self.models(setting))

    def scored(self, setting: Setting, method: str) -> list[Scored]:
        """A method's runs, by seed."""
        return [self._one(models, setting.run(method)) for models in self.models(setting).values()]

    def post_trained(self, setting: Setting) -> dict[str, float]:
        """The post-trained model's own measures, means over seeds: bits per byte and shares of questions."""
        wholes = [
            next(p for p in self.runs[models][ANCHOR, 0]["points"] if p["scale"] == 1.0)
            for models in self.models(setting).values()
        ]
        found = [self._tested(whole, "test") for whole in wholes]
        return {name: abs(float(np.mean([one[name][0] for one in found]))) for name in found[0]}

    def _one(self, models: tuple[str, int, str], run: tuple[str, int]) -> Scored:
        if (models, run) not in self._scored:
            self._scored[models, run] = self._read(self.runs[models][run], self.runs[models][ANCHOR, 0])
        return self._scored[models, run]

    def _read(self, run: Mapping[str, Any], anchor: Mapping[str, Any]) -> Scored:
        # The post-trained model is what a share of 0 leaves, wherever there is a delta.
        whole = next(point for point in anchor["points"] if point["scale"] == 1.0)
        begins = [whole] if any(point["scale"] == 1.0 for point in run["points"]) else []
        chosen = run["points"][run["chosen"]]
        points = [*begins, *(point for point in run["points"] if "test" in point)]
        test, other, validation = (
            [self._tested(point, "test") for point in (whole, *points)],
            [self._tested(point, "other") for point in (whole, chosen)],
            [means(point["validation"]) for point in (whole, *points)],
        )
        return Scored(
            record=run,
            test={name: np.stack([one[name] - test[0][name] for one in test[1:]], axis=1) for name in test[0]},
            validation={
                name: np.array([one[name] - validation[0][name] for one in validation[1:]]) for name in validation[0]
            },
            chosen=next(index for index, point in enumerate(points) if point is chosen),
            other={name: other[1][name] - other[0][name] for name in other[0]},
            anchored=bool(begins),
        )

    def _tested(self, point: Mapping[str, Any], part: str) -> dict[str, np.ndarray]:
        """Measures of one point, (1 + resamples,)."""
        bits = {
            code: self.weights[part, code] @ np.array(found) / (self.weights[part, code] @ self.sizes[part][code])
            for code, found in point[part]["bits"].items()
        }
        skill = {}
        for code, right in point[part]["skill"].items():
            skill[code] = self.weights["skill", code] @ np.array([int(digit) for digit in right]) / len(right)
        return means({"bits": bits, "skill": skill})

    @property
    def _any(self) -> Mapping[str, Any]:
        return next(iter(next(iter(self.runs.values())).values()))

    @cached_property
    def weights(self) -> dict[tuple[str, str], np.ndarray]:
        """How often each document and question is drawn, the same for all methods and seeds."""
        counts = {(part, code): len(n) for part in ("test", "other") for code, n in self.sizes[part].items()}
        one = next(point["test"]["skill"] for point in self._any["points"] if "test" in point)
        counts |= {("skill", code): len(right) for code, right in one.items()}
        return {key: document_weights(n, RESAMPLES, i) for i, (key, n) in enumerate(sorted(counts.items()))}


def means(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Bits and skill by language as the study's measures, all of them better the higher."""
    bits, skill = found["bits"], found["skill"]
    new = codes_of(bits)
    measures = {"en": -bits[ENGLISH], "new": -sum(bits[code] for code in new) / len(new)}
    if UNNAMED in bits:
        measures["unnamed"] = -bits[UNNAMED]
    if skill:
        measures |= {"skill": skill[ENGLISH], "new skill": sum(skill[code] for code in new) / len(new)}
    return measures
