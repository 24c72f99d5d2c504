"""What models keep against what they gain: the points of the frontier picture.

In: the paired differences of a report to its first reference. Out: for each thing that is to be kept, a point for each
model and new language, oriented so that more is better on both axes, and which of them no other model beats in both.
The reference itself is at the origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .report import TEXT, Difference, EvalReport, heading
from .verdict import judge, margin_of

MARKERS = ("o", "s", "D", "^", "v", "P", "X")
"""Of languages, in order."""

Errors = list[list[float]] | None
"""Lengths of an error bar, below and above; None where there is no interval."""


@dataclass(frozen=True)
class Point:
    """One model and one new language.

    Attributes:
        kept: change of what is to be kept; more is better.
        gained: bits per byte saved.
        kept_range, gained_range: their intervals; the value twice where there is none.
        beaten: it lost for sure, and gained nothing for sure, so that the reference is better in both.
    """

    model: str
    language: str
    kept: float
    gained: float
    kept_range: tuple[float, float]
    gained_range: tuple[float, float]
    beaten: bool

    def errors(self) -> tuple[Errors, Errors]:
        """Error bars to the left and right, and down and up."""
        return _errors(self.kept, self.kept_range), _errors(self.gained, self.gained_range)


@dataclass(frozen=True)
class Frontier:
    """One panel.

    Attributes:
        title: of what is to be kept.
        reference: the model at the origin.
        margin: a loss of what still counts as kept.
        points: of every model and new language.
    """

    title: str
    reference: str
    margin: float
    points: list[Point]

    def best(self, language: str) -> list[tuple[float, float]]:
        """`(kept, gained)` of what nothing beats in both, from left to right; the reference may be among it."""
        all_ = {(0.0, 0.0), *((point.kept, point.gained) for point in self.points if point.language == language)}
        return sorted(p for p in all_ if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in all_))

    def shown(self) -> list[Point]:
        """The points that are not beaten: those that are lie far off, and would squeeze the others."""
        return [point for point in self.points if not point.beaten]

    def left_out(self) -> dict[str, float]:
        """Models that are beaten -> what became of what was to be kept."""
        return {point.model: point.kept for point in self.points if point.beaten}

    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of both axes: around the origin and what is shown. What lies within the margin must not look large."""
        kept = [bound for point in self.shown() for bound in point.kept_range]
        gained = [bound for point in self.shown() for bound in point.gained_range]
        return _padded([*kept, -2 * self.margin, 2 * self.margin]), _padded([*gained, 0.0])


def frontier(report: EvalReport) -> list[Frontier]:
    """A panel for each thing that is to be kept: text of original languages, and all tasks. None where nothing is, or
    where no new language was measured."""
    if not report.references:
        return []
    reference = report.references[0]
    kept: dict[str, Difference] = {}
    for row in report.differences:
        if row.reference == reference and (row.task != TEXT or row.status == "original"):
            kept.setdefault(heading(row), row)
    panels = [
        Frontier(title, reference, margin_of(report, row), list(_points(report, row))) for title, row in kept.items()
    ]
    return [panel for panel in panels if panel.points]


def _points(report: EvalReport, measure: Difference) -> Iterator[Point]:
    reference = measure.reference
    new = [row for row in report.differences if row.status == "expanded" and row.task == TEXT]
    for model in report.own_first():
        lost = report.difference(model.name, reference, measure)
        gains = [row for row in new if (row.model, row.reference) == (model.name, reference)]
        if lost is None:
            continue
        beaten = judge(report, lost) == "worse" and all(judge(report, gain) != "better" for gain in gains)
        for gain in gains:
            kept, gained = _upwards(lost), _upwards(gain)
            yield Point(model.name, gain.language or "", kept[0], gained[0], kept[1:], gained[1:], beaten)


def _upwards(row: Difference) -> tuple[float, float, float]:
    """Value, low and high of a difference, turned so that more is better."""
    low, high = (row.value if bound is None else bound for bound in (row.low, row.high))
    return (row.value, low, high) if row.higher_is_better else (-row.value, -high, -low)


def _errors(value: float, bounds: tuple[float, float]) -> Errors:
    if bounds[0] == bounds[1]:
        return None
    return [[max(0.0, value - bounds[0])], [max(0.0, bounds[1] - value)]]


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 1.0
    return low - pad, high + pad
