"""The pictures of a report, panel by panel: each panel as SVG inside the page, and all of a picture as PNG beside it.

In: `EvalReport`. Out: pictures by name. Nothing is computed here: every point is a number of the report.
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import whole_file
from .frontier import MARKERS, Frontier, frontier
from .names import language_name
from .report import EvalReport, Routing, Score, heading
from .verdict import measures

INK = "#1f2430"
"""Of text and axes; in the page it follows the reader's light or dark theme."""

COLOURS = ("#3b82c4", "#d9822b", "#3f9f6b", "#c2557a", "#8a6fc8", "#5f9ea8", "#a8895f")
"""Of models, in order; legible on light and dark."""

REFERENCE = "*"
"""The marker of the model that a picture's differences count from."""

_PIXELS_AN_INCH = 120
_NAME, _TITLE = 21, 32  # characters of a line of a model's name, and of a panel's title

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


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, and what draws on them."""

    title: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Picture:
    """Panels of one kind.

    Attributes:
        panels: in order.
        width, height: of a panel, in inches.
        across: most panels side by side.
        shares_y: whether all panels have the same rows, which then are named once a line.
        legend: `(marker, colour, label)`.
    """

    panels: list[Panel]
    width: float
    height: float
    across: int
    shares_y: bool = False
    legend: list[tuple[str, str, str]] = field(default_factory=list)


def pictures(report: EvalReport) -> dict[str, Picture]:
    """Name -> picture, of what the report has."""
    made = {
        "scores": _scores(report),
        "frontier": _frontier(report),
        "routing": _routing(report),
        "transfer": _transfer(report),
    }
    return {name: picture for name, picture in made.items() if picture is not None}


def check_installed() -> None:
    """Ask before long work whether its report can be drawn.

    Raises:
        DataError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError('Drawing a report needs matplotlib, which is not installed. pip install "peft-moe-delta[eval]"')


def save_pngs(report: EvalReport, folder: Path) -> list[Path]:
    """Write every picture as `NAME.png`, on white.

    Raises:
        DataError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib

    paths = []
    for name, picture in pictures(report).items():
        paths.append(folder / f"{name}.png")
        with matplotlib.rc_context(_STYLE), whole_file(paths[-1]) as partial_file:
            _side_by_side(picture).savefig(partial_file, dpi=150, facecolor="white", format="png")
    return paths


def as_svgs(picture: Picture) -> list[tuple[str, str]]:
    """`(title, SVG element)` of each panel: without a background, and with the text colour of the page around it.

    Raises:
        DataError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return [(panel.title, _as_svg(picture, panel)) for panel in picture.panels]


def colour_of(report: EvalReport, model: str) -> str:
    """The colour of a model, the same in all pictures and on the page."""
    return COLOURS[[row.name for row in report.own_first()].index(model) % len(COLOURS)]


def _as_svg(picture: Picture, panel: Panel) -> str:
    figure = _figure(picture.width, picture.height)
    panel.draw(figure.subplots())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    element = f'<svg role="img" style="max-width: {figure.get_figwidth() * _PIXELS_AN_INCH:.0f}px" '
    return text[text.index("<svg") :].replace(INK, "currentColor").replace("<svg ", element, 1)


def _side_by_side(picture: Picture) -> Any:
    """All panels with their titles in one figure, and the legend below."""
    across = min(picture.across, len(picture.panels))
    down = -(-len(picture.panels) // across)
    legend_height = 0.2 * -(-len(picture.legend) // 3)
    figure = _figure(across * picture.width, down * (picture.height + 0.2) + legend_height)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for place, (axis, panel) in enumerate(zip(axes, picture.panels, strict=False)):
        panel.draw(axis)
        axis.set_title(textwrap.fill(panel.title, _TITLE))
        if picture.shares_y and place % across:
            axis.set_yticklabels([])
            axis.set_ylabel("")
    for axis in axes[len(picture.panels) :]:
        axis.set_axis_off()
    if picture.legend:
        figure.legend(handles=_handles(picture.legend), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _handles(legend: Sequence[tuple[str, str, str]]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker=m, linestyle="", color=colour, label=label) for m, colour, label in legend]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _scores(report: EvalReport) -> Picture | None:
    """Every measure of every model, with its interval: a panel for each measure, models from top to bottom."""
    models = [row.name for row in report.own_first()]
    panels = [Panel(heading(column), partial(_draw_scores, report, models, column)) for column in measures(report)]
    return Picture(panels, 3.3, 0.65 + 0.34 * len(models), across=3, shares_y=True) if panels else None


def _draw_scores(report: EvalReport, models: Sequence[str], column: Score, axis: Any) -> None:
    found = {place: score for place, model in enumerate(models) if (score := report.score(model, column)) is not None}
    for place, score in found.items():
        bounds = (score.value if bound is None else bound for bound in (score.low, score.high))
        error = [[abs(score.value - bound)] for bound in bounds]
        colour = colour_of(report, score.model)
        axis.errorbar(score.value, place, xerr=error, fmt="o", color=colour, capsize=2.5, markersize=5)
    axis.set_xlabel("higher is better →" if column.higher_is_better else "← lower is better", fontsize=8)
    axis.set_yticks(range(len(models)), [textwrap.fill(name, _NAME, break_on_hyphens=False) for name in models])
    axis.set_ylim(len(models) - 0.5, -0.5)
    axis.set_xlim(_score_limits(list(found.values())))
    axis.locator_params(axis="x", nbins=4)
    axis.grid(axis="x")


def _score_limits(scores: Sequence[Score]) -> tuple[float, float]:
    """Shares count from 0; other scores get an axis that does not make a twentieth of them look large."""
    low = min(score.value if score.low is None else score.low for score in scores)
    high = max(score.value if score.high is None else score.high for score in scores)
    if scores[0].metric != "bits_per_byte" and low >= 0 and high <= 1:
        top = high or 1.0
        return -0.03 * top, 1.06 * top
    half = 0.58 * (max(high - low, 0.05 * abs(high)) or 1.0)
    return (low + high) / 2 - half, (low + high) / 2 + half


def _frontier(report: EvalReport) -> Picture | None:
    """What was kept (to the right) and what was gained (up), a panel for each thing that is to be kept."""
    found = frontier(report)
    if not found:
        return None
    models = list(dict.fromkeys(point.model for panel in found for point in panel.shown()))
    languages = list(dict.fromkeys(point.language for panel in found for point in panel.points))
    legend = [("o", colour_of(report, model), model) for model in models]
    legend.append((REFERENCE, INK, f"{found[0].reference}, which the others are counted from"))
    legend += [(MARKERS[n % len(MARKERS)], "#888888", language_name(code)) for n, code in enumerate(languages)]
    panels = [Panel(panel.title, partial(_draw_frontier, report, panel, languages)) for panel in found]
    return Picture(panels, 3.3, 3.0, across=3, legend=legend)


def _draw_frontier(report: EvalReport, panel: Frontier, languages: Sequence[str], axis: Any) -> None:
    (left, right), (bottom, top) = panel.limits()
    axis.axvspan(-panel.margin, panel.margin, color="#888888", alpha=0.15, linewidth=0)
    axis.axhline(0, color=INK, linewidth=0.6)
    axis.axvline(0, color=INK, linewidth=0.6)
    for place, language in enumerate(languages):
        marker = MARKERS[place % len(MARKERS)]
        for point in (point for point in reversed(panel.shown()) if point.language == language):  # own on top
            x_error, y_error = point.errors()
            axis.errorbar(
                point.kept, point.gained, xerr=x_error, yerr=y_error, fmt=marker, color=colour_of(report, point.model),
                markersize=6, capsize=2, elinewidth=1,
            )  # fmt: skip
        best = panel.best(language)
        x, y = [left, *(kept for kept, _ in best)], [best[0][1], *(gained for _, gained in best)]
        axis.plot(
            x, y, drawstyle="steps-pre", color="#888888", linewidth=1, linestyle=("-", "--", ":", "-.")[place % 4]
        )
    axis.plot(0, 0, REFERENCE, color=INK, markersize=8)
    for place, (model, kept) in enumerate(panel.left_out().items()):
        told = textwrap.shorten(f"left out: {model} ({kept:+.2f})", 44, placeholder="…")
        axis.text(0.02, 0.02 + 0.07 * place, told, transform=axis.transAxes, color=colour_of(report, model), fontsize=8)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.locator_params(nbins=5)
    axis.set_xlabel("change of what was to be kept (better →)", fontsize=8)
    axis.set_ylabel("bits/byte saved (better →)", fontsize=8)
    axis.grid()


def _routing(report: EvalReport) -> Picture | None:
    """Layer x expert, a panel for each language; of the first of the report's own models that routes."""
    routed = {row.model for row in report.routing}
    shown = next((model.name for model in report.own_first() if model.name in routed), None)
    rows = [row for row in report.routing if row.model == shown]
    if not rows:
        return None
    panels = [Panel(language_name(row.language), partial(_draw_routing, row)) for row in rows]
    width, height = 1.0 + 0.45 * len(rows[0].experts), 1.3 + 0.17 * len(rows[0].layers)
    return Picture(panels, width, height, across=6, shares_y=True)


def _draw_routing(row: Routing, axis: Any) -> None:
    """Percent of tokens, as colour and number."""
    axis.imshow(row.shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, shares in enumerate(row.shares):
        for x, share in enumerate(shares):
            colour = "white" if share > 0.6 else INK
            axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(len(row.experts)), row.experts, rotation=40, ha="right", fontsize=7.5)
    axis.set_yticks(range(len(row.layers)), row.layers, fontsize=7.5)
    axis.set_ylabel("layer; % of tokens", fontsize=8)


def _transfer(report: EvalReport) -> Picture | None:
    """Train language (rows) x test language (columns): bits per byte saved."""
    if not report.transfer:
        return None
    rows = list(dict.fromkeys((t.model, t.trained) for t in report.transfer))
    tested = list(dict.fromkeys(t.tested for t in report.transfer))
    gains = {((t.model, t.trained), t.tested): t.gain for t in report.transfer}
    table = [[gains.get((row, column), float("nan")) for column in tested] for row in rows]
    names = [f"{textwrap.fill(model, _NAME, break_on_hyphens=False)}\n({trained})" for model, trained in rows]
    title = f"bits/byte saved against {report.transfer[0].reference}"
    panel = Panel(title, partial(_draw_transfer, table, names, [language_name(code) for code in tested]))
    return Picture([panel], max(3.3, 1.8 + 0.8 * len(tested)), 1.0 + 0.5 * len(rows), across=1)


def _draw_transfer(table: list[list[float]], names: Sequence[str], tested: Sequence[str], axis: Any) -> None:
    limit = max((abs(value) for row in table for value in row if value == value), default=0.0) or 1.0
    axis.imshow(table, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
    axis.set_xticks(range(len(tested)), tested)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("tested on")
    axis.set_ylabel("trained on")
    for y, values in enumerate(table):
        for x, value in enumerate(values):
            if value == value:  # else it was not measured
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(x, y, f"{value:+.3f}", ha="center", va="center", color=colour)
