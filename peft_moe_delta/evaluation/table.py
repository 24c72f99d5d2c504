"""A report as text: Markdown tables for terminals and READMEs.

In: `EvalReport`. Out: the models' scores, then the differences of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from .figures import heading
from .page import shown
from .report import Difference, EvalReport, Score


def markdown(report: EvalReport, model: str) -> str:
    """Scores of all models, and `model`'s differences to the models it was compared with."""
    columns = report.columns()
    head = ["", *(heading(column) for column in columns)]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_row(row.name, (report.score(row.name, column) for column in columns)) for row in report.models]
    pairs = [reference for name, reference in report.pairs() if name == model]
    if pairs:
        lines += ["", "Paired differences (95% intervals; bits per byte: lower is better):", ""]
        lines += [_line(head), _line(["---"] * len(head))]
    for reference in pairs:
        differences = (report.difference(model, reference, column) for column in columns)
        lines.append(_row(f"{model} - {reference}", differences, "+"))
    return "\n".join(lines)


def _row(name: str, cells: Iterable[Score | Difference | None], sign: str = "") -> str:
    return _line([name, *("" if cell is None else shown(cell, sign) for cell in cells)])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
