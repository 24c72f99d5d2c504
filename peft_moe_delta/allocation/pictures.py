"""Pictures: statistics by depth, and groups as a dendrogram beside a heat map. matplotlib (and scipy) are an extra.

In: what was measured or grouped. Out: a picture file, in the format that its name ends with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import whole_file
from .group import LanguageGroups
from .statistics import LanguageStatistics


def draw_statistics(statistics: LanguageStatistics, path: str | Path) -> None:
    """Similarity of all pairs of languages (mean, and each language's with the others) and deviation, by depth.

    Raises:
        DataError: matplotlib is not installed, or neither was measured.
    """
    wanted = [source for source in ("similarity", "deviation") if source in statistics.grams]
    if not wanted:
        raise DataError("These statistics hold neither similarity nor deviation, so there is nothing to draw.")
    drawing, axes = _figure(len(wanted), width=5.5, height=3.6)
    colours = _colours(len(statistics.languages))
    for axis, source in zip(axes, wanted, strict=True):
        curves = _curves(statistics, source)
        for (code, curve), colour in zip(curves.items(), colours, strict=True):
            axis.plot(statistics.layers, curve, color=colour, linewidth=1, label=code)
        axis.plot(statistics.layers, np.mean(list(curves.values()), axis=0), color="black", linewidth=2.5, label="mean")
        axis.set(xlabel="decoder layer", title=_TITLES[source])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, ncols=2)
    with whole_file(path) as partial:
        drawing.savefig(partial, dpi=110)


_TITLES = {
    "similarity": "cross-lingual similarity at the MLP's input",
    "deviation": "change of the MLP after tuning",
}


def _curves(statistics: LanguageStatistics, source: str) -> dict[str, np.ndarray]:
    """Language -> a figure a layer: its mean similarity with the others, or its deviation."""
    if source == "deviation":
        return statistics.deviation()
    others = [[other for other in statistics.languages if other != code] for code in statistics.languages]
    pairs = zip(statistics.languages, others, strict=True)
    return {code: statistics.similarity([code], rest) for code, rest in pairs}


def draw_groups(groups: LanguageGroups, path: str | Path) -> None:
    """Complete-linkage dendrogram of all languages, and the similarity in the order of the groups, each framed.

    Raises:
        DataError: matplotlib or scipy is not installed.
    """
    try:
        from scipy.cluster.hierarchy import dendrogram, linkage
    except ImportError as error:
        raise DataError("Drawing groups needs scipy: pip install scipy.") from error
    size = max(4.0, 0.28 * len(groups.languages))
    drawing, (left, right) = _figure(2, width=size, height=size)
    apart = 1 - groups.similarity[np.triu_indices(len(groups.languages), 1)]
    colours = dict(zip(groups.languages, ["black"] * len(groups.languages), strict=True))
    for group, colour in zip(groups.groups, _colours(len(groups.groups)), strict=True):
        colours |= dict.fromkeys(group, colour)
    tree = linkage(apart, method="complete")
    dendrogram(tree, labels=list(groups.languages), orientation="left", ax=left, link_color_func=lambda _: "grey")
    for label in left.get_yticklabels():
        label.set(color=colours[label.get_text()], fontweight="bold", fontsize=9)
    left.set(xlabel="distance (1 - similarity)", title="complete linkage; colour: group")
    order = [code for group in groups.groups for code in group]
    index = [groups.languages.index(code) for code in order]
    matrix = groups.similarity[np.ix_(index, index)].copy()
    np.fill_diagonal(matrix, np.nan)  # 1 by definition: it would wash the others out
    image = right.imshow(matrix, cmap="viridis")
    right.set_xticks(range(len(order)), order, rotation=90, fontsize=8)
    right.set_yticks(range(len(order)), order, fontsize=8)
    start = 0
    for group in groups.groups:
        right.add_patch(_frame(start, len(group)))
        start += len(group)
    right.set_title(f"similarity; stability {groups.stability:.2f}")
    drawing.colorbar(image, ax=right, shrink=0.8)
    with whole_file(path) as partial:
        drawing.savefig(partial, dpi=110)


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure with axes side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("Drawing needs matplotlib: pip install matplotlib.") from error
    drawing = Figure(figsize=(width * columns, height), layout="constrained")
    return drawing, drawing.subplots(1, columns, squeeze=False)[0]


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10" if number <= 10 else "tab20"](i % 20) for i in range(number)]


def _frame(start: int, size: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor="red", linewidth=2)
