"""The report to be read: Markdown tables for terminals, READMEs and cards, and one self-contained HTML page.

In: `EvalReport`. Out: Markdown; or `report.html` (no network, works from a file, light and dark, readable on a phone)
beside the JSON that every number in it comes from and the figures as PNG.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..files import write_text
from .figures import COLOURS, as_svg, colour_of, figures, save_pngs
from .report import METRICS, TEXT, Difference, EvalReport, Score, heading

PAGE = "report.html"
FIGURES = "figures"

EXPERT_COLOURS = ("#8a93a3", *COLOURS)
"""Of experts, in order; expert 0, the base model's own MLP, is grey."""


def write_report(report: EvalReport, folder: str | Path) -> Path:
    """Write `report.json`, `report.html` and `figures/*.png` into a folder. Returns the page.

    Raises:
        DataError: matplotlib is not installed.
    """
    folder = Path(folder)
    page = render(report)
    report.save(folder)
    write_text(folder / PAGE, page)
    save_pngs(report, folder / FIGURES)
    return folder / PAGE


def render(report: EvalReport) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("peft_moe_delta.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "percent": _percent, "number": _number}
    return environment.get_template("report.html.jinja").render(
        report=report,
        figures={name: Markup(as_svg(figure)) for name, figure in figures(report).items()},
        heading=heading,
        colours={row.name: colour_of(report, row.name) for row in report.models},
        verdict=verdict,
        viewed=viewed(report),
        transfer=transfer_table(report),
        command=shlex.join(report.command),
    )


def markdown(report: EvalReport, model: str) -> str:
    """Warnings, every model's scores, what `model` gained and lost, and how each number came about."""
    parts = [*(f"Warning: {warning}" for warning in report.warnings)]
    for title, table in tables(report, model):
        parts += [f"{title}:", table]
    if definitions := report.definitions():
        parts.append("\n".join(f"- {definition}" for definition in definitions))
    return "\n\n".join(parts)


def tables(report: EvalReport, model: str) -> list[tuple[str, str]]:
    """`(title, Markdown)`: every model's scores, then what the named one gained and lost."""
    columns = report.columns()
    found = [
        (
            "Scores, with 95% intervals",
            _table(
                columns,
                (
                    (_bold(row.name, model), [_cell(report.score(row.name, column)) for column in columns])
                    for row in report.models
                ),
            ),
        )
    ]
    pairs = [pair for pair in report.pairs() if pair[0] == model]
    if pairs:
        rows = (
            (f"minus {reference}", [_cell(report.difference(model, reference, c), "+") for c in columns])
            for _, reference in pairs
        )
        found.append((f"{model}, paired differences", _table(columns, rows)))
    return found


def _table(columns: list[Score], rows: Iterable[tuple[str, list[str]]]) -> str:
    lines = [["", *(_directed(column) for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *cells] for name, cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _directed(column: Score) -> str:
    """What was measured, in which language, and which way is up."""
    status = f" ({column.status})" if column.status else ""
    label = METRICS[column.metric].label if column.metric in METRICS else column.metric
    what = label if column.task == TEXT else f"{column.task}: {label}"
    return f"{column.language or ''}{status} {what} {'↑' if column.higher_is_better else '↓'}".strip()


def _cell(row: Score | Difference | None, sign: str = "") -> str:
    return "not measured" if row is None else shown(row, sign)


def _bold(name: str, model: str) -> str:
    return f"**{name}**" if name == model else name


def shown(row: Any, sign: str = "") -> str:
    """A value with its interval, where it has one: `1.050 [0.964, 1.155]`."""
    value = format(row.value, f"{sign}.3f")
    if row.low is None or row.high is None:
        return value
    return f"{value} [{row.low:{sign}.3f}, {row.high:{sign}.3f}]"


def verdict(difference: Any) -> str:
    """Whether a difference is a `gain`, a `loss`, or neither for sure: its interval holds 0."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "unsure"
    return "gain" if (difference.value > 0) == difference.higher_is_better else "loss"


def viewed(report: EvalReport) -> Markup:
    """What the interactive parts draw from, as JSON inside a script element: routing and token views."""
    data = {
        "colours": EXPERT_COLOURS,
        "routing": [vars(row) for row in report.routing],
        "tokens": [vars(row) for row in report.tokens],
    }
    return Markup(json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


def transfer_table(report: EvalReport) -> dict[str, Any]:
    """The transfer matrix as rows and columns."""
    tested = list(dict.fromkeys(t.tested for t in report.transfer))
    rows: dict[tuple[str, str], dict[str, Score]] = {}
    for t in report.transfer:
        cell = Score(
            model=t.model, task="", metric="", language=t.tested, status=None, value=t.gain, low=t.low, high=t.high
        )
        rows.setdefault((t.model, t.trained), {})[t.tested] = cell
    return {"tested": tested, "rows": rows}


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"
