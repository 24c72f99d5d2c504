"""From the scores of single items to the rows of a report: values with intervals, and differences of pairs.

In: for each model, one number an item of every measure. Out: `Score` and `Difference` rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from ..languages import ORIGINAL_GROUP, closest_code
from .bits_per_byte import TextScore
from .bootstrap import bootstrap_interval, paired_difference
from .confusion import ConfusionScore
from .exact_match import TaskScore
from .report import METRICS, TEXT, Difference, Score, Status, Transfer


@dataclass(frozen=True, eq=False)
class Items:
    """One measure of one model, item by item; fields as in `Score`.

    Attributes:
        values: one number an item.
        weights: what the sum of values is divided by, item by item (bytes); None for a mean.
        tokens: how many were scored; None where that is not counted.
        definition: how the number came about.
        paired: whether the same items are there for every model, so that differences mean something.
    """

    task: str
    metric: str
    language: str | None
    values: np.ndarray
    weights: np.ndarray | None = None
    paired: bool = True
    tokens: int | None = None
    definition: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        weights = None if self.weights is None else self.weights.tolist()
        return {**vars(self), "values": self.values.tolist(), "weights": weights}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Items:
        """Read what `to_json` gave."""
        weights = None if data["weights"] is None else np.array(data["weights"])
        return cls(**{**data, "values": np.array(data["values"]), "weights": weights})

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher_is_better


def text_items(language: str, score: TextScore) -> Items:
    """Bits per byte of held-out text."""
    return Items(
        TEXT,
        "bits_per_byte",
        language,
        score.bits,
        score.bytes,
        tokens=int(score.tokens.sum()),
        definition=score.definition,
    )


def task_items(name: str, language: str | None, score: TaskScore) -> Items:
    """Exact match of a set of tasks."""
    return Items(name, "exact_match", language, score.correct, definition=score.definition)


def confusion_items(name: str, language: str, score: ConfusionScore) -> list[Items]:
    """Line and, where there is one, word pass rate of responses; nothing where no response was counted."""
    rates = [("line_pass_rate", score.line_clean, score.counted)]
    if score.word_clean is not None:
        rates.append((score.word_metric, score.word_clean, score.line_clean))
    return [
        Items(name, metric, language, clean[counted].astype(float), paired=False, definition=score.definition)
        for metric, clean, counted in rates
        if counted.any()
    ]


def status_of(language: str | None, groups: Mapping[str, str]) -> Status | None:
    """What a language is to models whose languages have these groups."""
    if language is None:
        return None
    if (known := closest_code(language, groups)) is None:
        return "unseen"
    return "original" if groups[known] == ORIGINAL_GROUP else "expanded"


def compare(
    items: Mapping[str, Sequence[Items]], groups: Mapping[str, str], pairs: Sequence[tuple[str, str]]
) -> tuple[list[Score], list[Difference]]:
    """Rows of every model, and of every pair `(model, reference)`.

    Args:
        items: model -> its measures.
        groups: language -> group, `"original"` or another; a language without one is unseen.
        pairs: names of models.
    """
    scores = [_score(model, one, groups) for model, measured in items.items() for one in measured]
    differences = [
        _difference(model, reference, one, other, groups)
        for model, reference in pairs
        for one in items[model]
        for other in items[reference]
        if one.paired and (one.task, one.metric, one.language) == (other.task, other.metric, other.language)
    ]
    return scores, differences


def all_pairs(models: Iterable[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Every model with every reference that it is not itself."""
    models = list(models)
    return [(model, reference) for reference in references for model in models if model != reference]


def check_references(models: Iterable[str], references: Sequence[str]) -> None:
    """
    Raises:
        DataError: a reference is none of the models.
    """
    models = list(models)
    if missing := [name for name in references if name not in models]:
        raise DataError(
            f"references: got {missing}, which are none of the models {models}. Add them as models, or name others."
        )


def transfer(
    items: Mapping[str, Sequence[Items]], trained: Mapping[str, Sequence[str]], reference: str
) -> list[Transfer]:
    """The matrix of train language x test language: what models that were trained on some languages gained on each.

    Args:
        items: model -> its measures.
        trained: model -> the languages it was trained on; several are named together.
        reference: the model that gains are counted from.
    """
    rows = []
    for model, languages in trained.items():
        for one in items[model]:
            if one.metric != "bits_per_byte":
                continue
            other = next(r for r in items[reference] if (r.metric, r.language) == (one.metric, one.language))
            assert one.language is not None  # text has one
            gain = paired_difference(other.values, one.values, one.weights)
            row = {"model": model, "reference": reference, "trained": "+".join(languages), "tested": one.language}
            rows.append(Transfer(**row, gain=gain.value, low=gain.low, high=gain.high))
    return rows


def _score(model: str, one: Items, groups: Mapping[str, str]) -> Score:
    interval = bootstrap_interval(one.values, one.weights)
    return Score(
        model=model,
        task=one.task,
        metric=one.metric,
        language=one.language,
        status=status_of(one.language, groups),
        items=len(one.values),
        tokens=one.tokens,
        definition=one.definition,
        higher_is_better=one.higher_is_better,
        **interval._asdict(),
    )


def _difference(model: str, reference: str, one: Items, other: Items, groups: Mapping[str, str]) -> Difference:
    interval = paired_difference(one.values, other.values, one.weights)
    return Difference(
        model=model,
        reference=reference,
        task=one.task,
        metric=one.metric,
        language=one.language,
        status=status_of(one.language, groups),
        higher_is_better=one.higher_is_better,
        **interval._asdict(),
    )
