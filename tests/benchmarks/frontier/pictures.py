"""The frontiers as pictures, from the scores alone. SVG with text as text, no date and fixed ids: the same scores give
the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .methods import METHODS
from .scores import AXES, GAIN, RETENTION, Results, Setting
from .tables import stem

LEVELS = np.linspace(-0.25, 0.02, 28)
STYLE = {"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 8}
UNTRAINED = ("base", "post-trained")


def draw(results: Results, folder: Path) -> list[Path]:
    """A picture for each setting. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [setting for setting in results.settings if results.seeds(setting)]
    return [draw_setting(results, setting, folder / f"{stem(setting)}.svg") for setting in shown]


def draw_setting(results: Results, setting: Setting, path: Path) -> Path:
    """Four panels: each kind of retention against each kind of gain."""
    methods = [method for method in results.methods(setting) if method not in UNTRAINED]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 7.5), layout="constrained")
        panels = figure.subplots(2, 2)
        for panel, (kept, gained) in zip(panels.flat, AXES, strict=True):
            for method in methods:
                line(panel, method, curve(results, setting, method, kept, gained))
            panel.set_xlabel(f"{RETENTION[kept]}, less the post-trained model's")
            panel.set_ylabel(f"{GAIN[gained]}, gained")
            panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
            panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{setting}: the most gained where so much is kept, mean over seeds")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path


def curve(results: Results, setting: Setting, method: str, kept: str, gained: str) -> np.ndarray:
    """The mean over seeds of the gain at each of `LEVELS`, rounded so that no processor draws another line."""
    runs = results.scored(setting, method)
    found = [[run.gain_at(kept, gained, level)[0] for level in LEVELS] for run in runs]
    return np.round(np.mean(found, axis=0), 4)


def line(panel: Any, method: str, values: np.ndarray) -> None:
    """Ours in full lines, others dashed, each method in its colour."""
    index = list(METHODS).index(method)
    ours = METHODS[method].title.startswith("ours")
    panel.plot(
        LEVELS, values, label=METHODS[method].title, color=matplotlib.colormaps["tab20"](index % 20),
        linestyle="-" if ours else "--", linewidth=1.6 if ours else 1.2,
    )  # fmt: skip
