"""The table that a recipe ends with.

In: the scores of each model. Out: figures with bootstrap intervals, and paired differences where two models are
compared, as text (Markdown), JSON and a picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import Interval, bootstrap_interval, paired_difference
from ..evaluation.report import TEXT, Difference, EvalReport, Model, Score, Status
from ..languages import ORIGINAL_GROUP
from .scoring import FILE

BASE, POST_TRAINED, DENSE = "base", "post-trained", "dense continual pre-training + delta"
OURS_WHOLE, OURS = "ours, experts as trained", "ours, grafted"


@dataclass(frozen=True)
class Column:
    """One measure: its heading, where its numbers are, and which way is up."""

    heading: str
    kind: str
    name: str
    higher_is_better: bool


class Table:
    """Rows are models, columns are measures."""

    def __init__(self, scores: Mapping[str, Path]) -> None:
        self.scores = {row: json.loads((folder / FILE).read_text(encoding="utf-8")) for row, folder in scores.items()}
        first = next(iter(self.scores.values()))
        self.columns = [Column(f"{code} bits/byte", "text", code, False) for code in first["text"]]
        self.columns += [Column(name, "tasks", name, True) for name in first["tasks"]]

    def figure(self, row: str, column: Column) -> Interval:
        """A model's score with its 95% interval."""
        return bootstrap_interval(*self._items(row, column))

    def difference(self, row: str, reference: str, column: Column) -> Interval:
        """A model's score minus another's on the same items, with its 95% interval."""
        items, weights = self._items(row, column)
        return paired_difference(items, self._items(reference, column)[0], weights)

    def _items(self, row: str, column: Column) -> tuple[np.ndarray, np.ndarray | None]:
        items = self.scores[row][column.kind][column.name]
        if column.kind == "text":
            return np.array(items["bits"]), np.array(items["bytes"])
        return np.array(items), None

    def comparisons(self) -> list[tuple[str, str]]:
        """The pairs of models worth comparing, of those that are there."""
        pairs = [(OURS, POST_TRAINED), (OURS, DENSE), (OURS, OURS_WHOLE)]
        return [(a, b) for a, b in pairs if a in self.scores and b in self.scores]

    def text(self) -> str:
        """Markdown: the figures, then our differences."""
        lines = [_line(["", *(c.heading for c in self.columns)]), _line(["---"] * (len(self.columns) + 1))]
        for row in self.scores:
            lines.append(_line([row, *(_shown(self.figure(row, c)) for c in self.columns)]))
        lines += ["", "Paired differences (95% intervals; bits per byte: lower is better):", ""]
        lines += [_line(["", *(c.heading for c in self.columns)]), _line(["---"] * (len(self.columns) + 1))]
        for a, b in self.comparisons():
            lines.append(_line([f"{a} - {b}", *(_shown(self.difference(a, b, c), "+") for c in self.columns)]))
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        """All figures: `{"figures": {row: {heading: {value, low, high}}}, "differences": {...}}`."""
        return {
            "figures": {r: {c.heading: self.figure(r, c)._asdict() for c in self.columns} for r in self.scores},
            "differences": {
                f"{a} - {b}": {c.heading: self.difference(a, b, c)._asdict() for c in self.columns}
                for a, b in self.comparisons()
            },
        }

    def report(self, groups: Mapping[str, str]) -> EvalReport:
        """The same figures as rows; `groups` is language -> group."""
        status: dict[str, Status] = {
            code: "original" if group == ORIGINAL_GROUP else "expanded" for code, group in groups.items()
        }

        def row(column: Column) -> dict[str, Any]:
            is_text = column.kind == "text"
            return {
                "task": TEXT if is_text else column.name,
                "metric": "bits_per_byte" if is_text else "exact_match",
                "language": column.name if is_text else None,
                "status": status[column.name] if is_text else None,
                "higher_is_better": column.higher_is_better,
            }

        return EvalReport(
            models=[Model(name=name) for name in self.scores],
            languages=status,
            references=[POST_TRAINED, BASE],
            scores=[
                Score(model=r, items=len(self._items(r, c)[0]), **row(c), **self.figure(r, c)._asdict())
                for r in self.scores
                for c in self.columns
            ],
            differences=[
                Difference(model=a, reference=b, **row(c), **self.difference(a, b, c)._asdict())
                for a, b in self.comparisons()
                for c in self.columns
            ],
        )

    def save(self, folder: Path) -> None:
        """`table.md`, `table.json` and, where matplotlib is installed, `table.png`."""
        (folder / "table.md").write_text(self.text() + "\n", encoding="utf-8")
        (folder / "table.json").write_text(json.dumps(self.data(), indent=1), encoding="utf-8")
        self._draw(folder / "table.png")

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:  # an extra
            return
        drawing = Figure(figsize=(2.6 * len(self.columns) + 2, 0.5 * len(self.scores) + 1.4), layout="constrained")
        axes = drawing.subplots(1, len(self.columns), sharey=True, squeeze=False)[0]
        rows = list(self.scores)
        for axis, column in zip(axes, self.columns, strict=True):
            figures = [self.figure(row, column) for row in rows]
            for place, (row, f) in enumerate(zip(rows, figures, strict=True)):
                colour = "tab:red" if row == OURS else "tab:gray"
                axis.errorbar(
                    f.value, place, xerr=[[f.value - f.low], [f.high - f.value]], fmt="o", color=colour, capsize=3
                )
            axis.set_title(column.heading, fontsize=10)
            axis.set_xlabel("higher is better" if column.higher_is_better else "lower is better", fontsize=8)
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].invert_yaxis()
        drawing.savefig(path, dpi=150)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(interval: Interval, sign: str = "") -> str:
    value, low, high = (format(number, f"{sign}.3f") for number in interval)
    return f"{value} [{low}, {high}]"
