"""The report's numbers as a model card shows them.

In: an `EvalReport`. Out: tables in Markdown, and the Hub's evaluation results of one of its models. Numbers are the
report's own: nothing is averaged, and nothing is left out of the card's model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from huggingface_hub import EvalResult

from ..evaluation.report import METRICS, TEXT, Difference, EvalReport, Score


def eval_results(report: EvalReport, model: str) -> list[EvalResult]:
    """The scores of a model of the report, one result each."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=_slug(score.task),
            dataset_name=score.task if score.language is None else f"{score.task} ({score.language})",
            dataset_config=score.language,
            metric_type=score.metric,
            metric_name=_label(score.metric),
            metric_value=score.value,
        )
        for score in report.scores
        if score.model == model
    ]


def tables(report: EvalReport, model: str) -> list[tuple[str, str]]:
    """`(heading, Markdown)`: every model's scores, then what the named one gained and lost."""
    columns = report.columns()
    found = [
        (
            "Scores, with 95% intervals",
            _table(
                columns,
                (
                    (_bold(row.name, model), [_shown(report.score(row.name, column)) for column in columns])
                    for row in report.models
                ),
            ),
        )
    ]
    pairs = [pair for pair in report.pairs() if pair[0] == model]
    if pairs:
        rows = (
            (f"minus {reference}", [_shown(report.difference(model, reference, c), sign="+") for c in columns])
            for _, reference in pairs
        )
        found.append((f"{model}, paired differences", _table(columns, rows)))
    return found


def _table(columns: list[Score], rows: Iterable[tuple[str, list[str]]]) -> str:
    lines = [["", *(_heading(column) for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *cells] for name, cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _heading(column: Score) -> str:
    """What was measured, in which language, and which way is up."""
    status = f" ({column.status})" if column.status else ""
    what = _label(column.metric) if column.task == TEXT else f"{column.task}: {_label(column.metric)}"
    return f"{column.language or ''}{status} {what} {'↑' if column.higher_is_better else '↓'}".strip()


def _shown(row: Score | Difference | None, sign: str = "") -> str:
    if row is None:
        return "not measured"
    value = format(row.value, f"{sign}.3f")
    return value if row.low is None or row.high is None else f"{value} [{row.low:{sign}.3f}, {row.high:{sign}.3f}]"


def _bold(name: str, model: str) -> str:
    return f"**{name}**" if name == model else name


def _label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
