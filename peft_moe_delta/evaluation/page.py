"""The report to be read: Markdown tables for terminals, READMEs and cards, and one self-contained HTML page.

In: `EvalReport`. Out: Markdown; or `report.html` (no network, works from a file, light and dark, on a phone and on
paper) beside the JSON that every number in it comes from and the pictures as PNG.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..files import write_text
from .figures import COLOURS, REFERENCE, as_svgs, colour_of, pictures, save_pngs
from .names import language_name
from .report import METRICS, TEXT, Agreement, Difference, EvalReport, Fertility, Model, Score, heading
from .verdict import RULE, judge, measures, verdict

PAGE = "report.html"
FIGURES = "figures"

EXPERT_COLOURS = ("#8a93a3", *COLOURS)
"""Of experts, in order; expert 0, the base model's own MLP, is grey."""

_ON_PAGE = ("scores", "frontier")  # the other pictures are there as tables
_GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", REFERENCE: "★"}


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
    """The page's HTML.

    Raises:
        DataError: matplotlib is not installed.
    """
    environment = Environment(
        loader=PackageLoader("peft_moe_delta.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "percent": _percent, "number": _number, "language": language_name}
    drawn = {name: picture for name, picture in pictures(report).items() if name in _ON_PAGE}
    return environment.get_template("report.html.jinja").render(
        report=report,
        verdicts=[told for model in report.subjects() if (told := verdict(report, model)) is not None],
        rule=RULE,
        models=report.own_first(),
        measures=measures(report),
        comparisons=comparisons(report),
        panels={name: [(t, Markup(svg)) for t, svg in as_svgs(picture)] for name, picture in drawn.items()},
        legend=[(_GLYPHS[marker], *rest) for marker, *rest in drawn["frontier"].legend] if "frontier" in drawn else [],
        heading=heading,
        agreement=agreement(report),
        colours={row.name: colour_of(report, row.name) for row in report.models},
        judge=lambda difference: judge(report, difference),
        facts=facts(report),
        tokenizers=tokenizers(report),
        viewed=viewed(report),
        transfer=transfer_table(report),
        command=shlex.join(report.command),
    )


def markdown(report: EvalReport, model: str) -> str:
    """Warnings, every model's scores, what `model` gained and lost, how each number came about, and the verdict."""
    parts = [*(f"Warning: {warning}" for warning in report.warnings)]
    for title, table in tables(report, model):
        parts += [f"{title}:", table]
    if definitions := report.definitions():
        parts.append("\n".join(f"- {definition}" for definition in definitions))
    if (told := verdict(report, model)) is not None:
        parts.append(f"{told}\n({RULE})")
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


class Comparison(NamedTuple):
    """One reference of the table of differences: the models that were compared with it, and a row for each measure."""

    reference: str
    models: list[str]
    rows: list[tuple[Score, list[Difference | None]]]


def comparisons(report: EvalReport) -> list[Comparison]:
    """One for each reference, with the rows and columns that have a number."""
    found = []
    for reference in dict.fromkeys([*report.references, *(reference for _, reference in report.pairs())]):
        models = [row.name for row in report.own_first() if (row.name, reference) in report.pairs()]
        rows = [(column, [report.difference(m, reference, column) for m in models]) for column in measures(report)]
        if models:
            found.append(Comparison(reference, models, [row for row in rows if any(row[1])]))
    return found


def facts(report: EvalReport) -> dict[str, list[str]]:
    """By the column's name what is known of each model, in the order of the tables; only of what is known of some."""
    columns: dict[str, Callable[[Model], str]] = {
        "measured": lambda model: model.measured or "",
        "parameters, millions": lambda model: _number(model.parameters, 1e6, 1),
        "tokens/s, scoring": lambda model: _number(model.tokens_per_second),
        "peak memory, GB": lambda model: _number(model.peak_memory_bytes, 1e9, 2),
        "from": lambda model: model.source or "",
    }
    found = {name: [say(model) for model in report.own_first()] for name, say in columns.items()}
    return {name: cells for name, cells in found.items() if any(cells)}


def agreement(report: EvalReport) -> dict[tuple[str, str], list[Agreement]]:
    """What is known of the routes of each two models."""
    found: dict[tuple[str, str], list[Agreement]] = {}
    for row in report.agreement:
        found.setdefault((row.model, row.reference), []).append(row)
    return found


def tokenizers(report: EvalReport) -> list[tuple[list[str], dict[str, Fertility]]]:
    """`(models, language -> what their tokenizer makes of it)`: models with the same figures stand together."""
    found: dict[tuple[Any, ...], tuple[list[str], dict[str, Fertility]]] = {}
    for model in report.own_first():
        rows = {row.language: row for row in report.fertility if row.model == model.name}
        key = tuple((code, row.tokens_per_word, row.bytes_per_token) for code, row in rows.items())
        if rows:
            found.setdefault(key, ([], rows))[0].append(model.name)
    return list(found.values())


def viewed(report: EvalReport) -> Markup:
    """What the interactive parts draw from, as JSON inside a script element: routing and token views."""
    order = [model.name for model in report.own_first()]
    codes = {row.language for row in report.routing} | {row.language for row in report.tokens}
    data = {
        "colours": EXPERT_COLOURS,
        "names": {code: language_name(code) for code in sorted(codes)},
        "routing": [vars(row) for row in sorted(report.routing, key=lambda row: order.index(row.model))],
        "tokens": [vars(row) for row in sorted(report.tokens, key=lambda row: order.index(row.model))],
    }
    return Markup(json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


def transfer_table(report: EvalReport) -> dict[str, Any]:
    """The transfer matrix as rows and columns."""
    tested = list(dict.fromkeys(t.tested for t in report.transfer))
    rows: dict[tuple[str, str], dict[str, Difference]] = {}
    for t in report.transfer:
        cell = Difference(
            model=t.model,
            reference=t.reference,
            task=TEXT,
            metric="bits_per_byte",
            language=t.tested,
            status=None,
            value=t.gain,
            low=t.low,
            high=t.high,
        )
        rows.setdefault((t.model, t.trained), {})[t.tested] = cell
    return {"tested": tested, "rows": rows}


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"
