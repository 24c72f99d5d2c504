"""A delta as a picture: `||Delta|| / ||W_0||` of attention and MLPs, layer by layer.

In: a stored delta. Out: an image file. Needs matplotlib, which the package does not ask for otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import PeftMoeDeltaError
from ..files import whole_file
from .report import DOUBTFUL_RATIO, family_of
from .stored import DeltaFile

_COLOURS = {"self_attn": "#0072b2", "mlp": "#d55e00", "norm": "#6a6a6a"}
_LAYER = re.compile(r"\.(\d+)\.")


def draw_delta(delta: DeltaFile, path: str | Path) -> None:
    """Draw a delta; the suffix of `path` (.png, .svg, .pdf) chooses the format.

    Raises:
        PeftMoeDeltaError: matplotlib is not installed, or the delta has no layers.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PeftMoeDeltaError("Drawing a delta needs matplotlib. pip install matplotlib.") from error
    series = layer_ratios(delta)
    if not series:
        raise PeftMoeDeltaError(f"{delta.path} has no numbered layers, so there is nothing to draw over them.")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for family, ratios in series.items():
        axes.plot(
            list(ratios), list(ratios.values()), marker="o", markersize=3, color=_COLOURS.get(family), label=family
        )
    highest = max(ratio for ratios in series.values() for ratio in ratios.values())
    if highest > DOUBTFUL_RATIO / 2:
        axes.axhline(DOUBTFUL_RATIO, color="#b00020", linestyle="--", linewidth=1, label="doubtful from here")
    axes.set(xlabel="layer", ylabel="||Delta|| / ||W||", title=f"What post-training changed: {delta.path.name}")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with whole_file(path) as partial:
        figure.savefig(partial)


def layer_ratios(delta: DeltaFile) -> dict[str, dict[int, float]]:
    """Part of the model -> layer -> `||Delta|| / ||W_0||`, both ascending."""
    squares: dict[tuple[str, int], list[float]] = {}
    for name, stored in delta.tensors.items():
        if match := _LAYER.search(name):
            row = squares.setdefault((family_of(name), int(match[1])), [0.0, 0.0])
            row[0] += stored.delta
            row[1] += stored.weight
    series: dict[str, dict[int, float]] = {}
    for (family, layer), (change, weight) in sorted(squares.items()):
        series.setdefault(family, {})[layer] = (change / weight) ** 0.5 if weight else 0.0
    return series
