"""The figures of a report, as matplotlib draws them: one drawing each, as SVG inside the page and as PNG beside it.

In: `EvalReport`. Out: figures by name. Nothing is computed here: every point is a number of the report.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import whole_file
from .report import TEXT, Difference, EvalReport, Score, heading

INK = "#1f2430"
"""Of text and axes; in the page it follows the reader's light or dark theme."""

COLOURS = ("#3b82c4", "#d9822b", "#3f9f6b", "#c2557a", "#8a6fc8", "#5f9ea8", "#a8895f")
"""Of models, in order; legible on light and dark."""

_PIXELS_AN_INCH = 120

MARKERS = ("o", "s", "D", "^", "v", "P", "X")
"""Of languages, in order."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "svg.fonttype": "none",
    "svg.hashsalt": "peft-moe-delta",
}


def figures(report: EvalReport) -> dict[str, Any]:
    """Name -> matplotlib figure, of what the report has.

    Raises:
        DataError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib

    drawn: dict[str, Callable[[EvalReport], Any]] = {
        "scores": _scores,
        "retention_against_expansion": _retention_against_expansion,
        "routing": _routing,
        "transfer": _transfer,
    }
    with matplotlib.rc_context(_STYLE):
        made = {name: draw(report) for name, draw in drawn.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def check_installed() -> None:
    """Ask before long work whether its report can be drawn.

    Raises:
        DataError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError('Drawing a report needs matplotlib, which is not installed. pip install "peft-moe-delta[eval]"')


def save_pngs(report: EvalReport, folder: Path) -> list[Path]:
    """Write every figure as `NAME.png`, on white."""
    paths = []
    for name, figure in figures(report).items():
        paths.append(folder / f"{name}.png")
        with whole_file(paths[-1]) as partial:
            figure.savefig(partial, dpi=150, facecolor="white")
    return paths


def as_svg(figure: Any) -> str:
    """An SVG element without a background, whose ink is the text colour of the page around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    width = f'style="max-width: {figure.get_figwidth() * _PIXELS_AN_INCH:.0f}px" '
    return text[text.index("<svg") :].replace(INK, "currentColor").replace("<svg ", f"<svg {width}", 1)


def colour_of(report: EvalReport, model: str) -> str:
    """The colour of a model, the same in all figures and on the page."""
    return COLOURS[[row.name for row in report.models].index(model) % len(COLOURS)]


def saved_bits(report: EvalReport) -> Iterator[Difference]:
    """Differences of text in expanded languages: what an expansion is for."""
    return (d for d in report.differences if d.status == "expanded" and d.task == TEXT)


def kept(report: EvalReport) -> list[Difference]:
    """One difference of everything that is to be kept: text of original languages, and all tasks."""
    found: dict[str, Difference] = {}
    for difference in report.differences:
        if difference.task != TEXT or difference.status == "original":
            found.setdefault(heading(difference), difference)
    return list(found.values())


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _error(row: Score | Difference) -> list[list[float]] | None:
    if row.low is None or row.high is None:
        return None
    return [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]


def _scores(report: EvalReport) -> Any:
    """Every measure of every model, with its interval: small multiples, models from top to bottom."""
    columns, models = report.columns(), [row.name for row in report.models]
    if not columns:
        return None
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = _figure(8, 0.9 + down * (0.75 + 0.22 * len(models)))
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axis, column in zip(axes, columns, strict=False):
        for place, model in enumerate(models):
            if (score := report.score(model, column)) is not None:
                colour = colour_of(report, model)
                axis.errorbar(score.value, place, xerr=_error(score), fmt="o", color=colour, capsize=2.5, markersize=5)
        axis.set_title(heading(column))
        axis.set_xlabel("higher is better" if column.higher_is_better else "lower is better", fontsize=7.5)
        axis.set_yticks(range(len(models)), models)
        axis.grid(axis="x")
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    axes[0].invert_yaxis()
    return figure


def _retention_against_expansion(report: EvalReport) -> Any:
    """Gain in each expanded language (to the right) against what happened to each thing that is to be kept (up), all
    as differences to the first reference: a panel for each thing, a point for each model and language."""
    if not report.references:
        return None
    reference, kept_rows = report.references[0], kept(report)
    models = [row.name for row in report.models if any(d.model == row.name for d in report.differences)]
    languages = list(dict.fromkeys(d.language for d in saved_bits(report)))
    if not (kept_rows and languages):
        return None
    figure = _figure(max(4.5, 0.5 + 2.9 * len(kept_rows)), 4.1)
    axes = figure.subplots(1, len(kept_rows), squeeze=False)[0]
    for axis, measure in zip(axes, kept_rows, strict=True):
        for model in models:
            lost = report.difference(model, reference, measure)
            for language, marker in zip(languages, MARKERS * len(languages), strict=False):
                gain = next((d for d in saved_bits(report) if _is(d, model, reference, language)), None)
                if gain is None or lost is None:
                    continue
                x, y = -gain.value, lost.value if lost.higher_is_better else -lost.value
                x_error, y_error = _error(gain), _error(lost)
                axis.errorbar(
                    x,
                    y,
                    xerr=x_error and x_error[::-1],
                    yerr=y_error if lost.higher_is_better else y_error and y_error[::-1],
                    fmt=marker,
                    color=colour_of(report, model),
                    markersize=6,
                    capsize=2,
                    elinewidth=1,
                )
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_title(heading(measure))
        axis.set_xlabel("bits/byte saved (better →)")
        axis.grid()
    axes[0].set_ylabel(f"change from {reference} (better ↑)")
    _legend(figure, report, models, languages)
    return figure


def _is(difference: Difference, model: str, reference: str, language: str | None) -> bool:
    return (difference.model, difference.reference, difference.language) == (model, reference, language)


def _legend(figure: Any, report: EvalReport, models: list[str], languages: list[str | None]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=colour_of(report, m), label=m) for m in models]
    for language, marker in zip(languages, MARKERS * len(languages), strict=False):
        handles.append(Line2D([], [], marker=marker, linestyle="", color="#888888", label=str(language)))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _routing(report: EvalReport) -> Any:
    """Layer x expert, a panel for each language; of the last model that routes, which is the one of interest."""
    if not report.routing:
        return None
    last = report.routing[-1].model
    rows = [row for row in report.routing if row.model == last]
    height = 1.3 + 0.15 * len(rows[0].layers)
    figure = _figure(max(4.5, 1.2 + len(rows) * (0.9 + 0.3 * len(rows[0].experts))), height)
    axes = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axis, row in zip(axes, rows, strict=True):
        image = axis.imshow(row.shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(row.language)
        axis.set_xticks(range(len(row.experts)), row.experts, rotation=40, ha="right", fontsize=7.5)
        every = max(1, len(row.layers) // 10)
        axis.set_yticks(range(0, len(row.layers), every), row.layers[::every])
    axes[0].set_ylabel(f"layer of {last}")
    figure.colorbar(image, ax=list(axes), label="share of tokens", shrink=0.8)
    return figure


def _transfer(report: EvalReport) -> Any:
    """Train language (rows) x test language (columns): bits per byte saved."""
    if not report.transfer:
        return None
    rows = list(dict.fromkeys((t.model, t.trained) for t in report.transfer))
    tested = list(dict.fromkeys(t.tested for t in report.transfer))
    gains = {((t.model, t.trained), t.tested): t.gain for t in report.transfer}
    table = [[gains.get((row, column), float("nan")) for column in tested] for row in rows]
    limit = max(abs(t.gain) for t in report.transfer) or 1.0
    figure = _figure(2.2 + 0.9 * len(tested), 1.4 + 0.5 * len(rows))
    axis = figure.subplots()
    image = axis.imshow(table, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
    axis.set_xticks(range(len(tested)), tested)
    axis.set_yticks(range(len(rows)), [f"{model}\n({trained})" for model, trained in rows])
    axis.set_xlabel("tested on")
    axis.set_ylabel("trained on")
    for y, values in enumerate(table):
        for x, value in enumerate(values):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axis.text(x, y, f"{value:+.3f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axis, label=f"bits/byte saved against {report.transfer[0].reference}")
    return figure
