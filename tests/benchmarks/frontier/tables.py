"""The tables of docs/evidence.md, from the scores alone; the same scores give the same text, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from peft_moe_delta.evaluation.bootstrap import Interval

from .intervals import interval
from .methods import METHODS
from .scores import AXES, GAIN, LOWEST, RETENTION, Results, Scored, Setting

OURS = ("ours-learned-upper", "ours-by-context", "over-learned-upper", "over-context")
"""Those that nobody tells a language: what is compared with everything else."""
BUDGETS = {"en": -0.02, "skill": -0.02}
HALF = 0.5
BEGIN, END = "<!-- evidence: begin, made by evidence.py pages -->", "<!-- evidence: end -->"
NOTHING = "No run has been committed yet, so there is nothing to claim here."


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Everything between the page's markers."""
    if not any(results.seeds(setting) for setting in results.settings):
        return NOTHING
    parts = [costs(results), *(part for setting in results.settings for part in section(results, setting, pictures))]
    return "\n\n".join(parts)


def section(results: Results, setting: Setting, pictures: Sequence[Path]) -> Iterator[str]:
    """All there is to say of one pair and length."""
    seeds = results.seeds(setting)
    if not seeds:
        return
    yield f"### {setting}"
    own = {name: f"{value:.3f}" for name, value in results.post_trained(setting).items()}
    moved = [one.record["moved"] for one in results.scored(setting, "post-trained")]
    yield (
        f"Random seeds {', '.join(map(str, seeds))}; post-training moved the embeddings by {min(moved):.2f} to "
        f"{max(moved):.2f} of their length. The post-trained model has {own['en']} bits per byte of English, "
        f"{own['new']} of the new languages and {own['unnamed']} of German, and answers "
        f"{own['skill']} of the English questions and {own['new skill']} of those in new languages."
    )
    yield from (f"![frontiers of {setting}](figures/{p.name})" for p in pictures if p.stem == stem(setting))
    yield chosen_table(results, setting)
    yield frontier_table(results, setting)
    yield from (difference_table(results, setting, ours) for ours in OURS if ours in results.methods(setting))


def stem(setting: Setting) -> str:
    """A picture's file name, without its ending."""
    return f"frontier-{setting.pair}-{setting.steps}"


def costs(results: Results) -> str:
    """Parameters, operations and learning rates."""
    first = next(setting for setting in results.settings if results.seeds(setting))
    rows = []
    for method in results.methods(first):
        one = results.scored(first, method)[0].record
        rate = f"{one['rate']:g}" if METHODS[method].trains else ""
        flops = [f"{value / 1e6:.2f}" for value in one["flops"].values()]
        rows.append((METHODS[method].title, f"{one['trained']:,}", f"{one['parameters']:,}", *flops, rate))
    head = ("", "trained parameters", "all", "MFLOPs per token, English", "new language", "learning rate")
    return f"What each method costs, on the pair {first.pair}:\n\n" + table(head, rows)


def chosen_table(results: Results, setting: Setting) -> str:
    """Every method at the point that validation chose, less the post-trained model."""
    rows = []
    for method in results.methods(setting):
        runs = results.scored(setting, method)
        points = [run.record["points"][run.record["chosen"]] for run in runs]
        turned = "; ".join(f"{p['share']:g}, {p['scale']:g}" for p in points)
        names = ("en", "new", "unnamed", "skill", "new skill")
        own = [shown(mean_of(results, [run.test[n][:, run.chosen] for run in runs])) for n in names]
        other = [shown(mean_of(results, [run.other[n] for run in runs], "other")) for n in ("en", "new", "unnamed")]
        rows.append((METHODS[method].title, turned, *own, *other, passed(runs)))
    head = (
        "", "a, s of each seed", "en", "new", "de, unnamed", "English questions", "new questions",
        "other domain: en", "new", "de", "line pass rate",
    )  # fmt: skip
    return (
        "At the point that validation chose, beside the post-trained model: bits per byte saved, and share of "
        "questions answered more.\n\n" + table(head, rows)
    )


def passed(runs: Sequence[Scored]) -> str:
    """The mean line pass rate over languages and seeds, where any response was long enough."""
    rates = [r for run in runs for r in run.record["line_pass_rate"].values() if r is not None]
    return f"{np.mean(rates):.2f}" if rates else ""


def frontier_table(results: Results, setting: Setting) -> str:
    """Every method's mean gain within what may be lost, and what it gains and keeps at one level."""
    rows = []
    for method in results.methods(setting):
        runs = results.scored(setting, method)
        areas = [shown(mean_of(results, [run.area(*axes) for run in runs])) for axes in AXES]
        level = [shown(mean_of(results, [run.gain_at(k, g, BUDGETS[k]) for run in runs])) for k, g in AXES[:2]]
        rows.append((METHODS[method].title, *areas, *level))
    within = {kept: f"{-lowest:g}" for kept, lowest in LOWEST.items()}
    head = ["", *(f"{GAIN[g]}, {within[k]} of {RETENTION[k]}" for k, g in AXES)]
    head += [f"{GAIN[g]}, at {-BUDGETS[k]:g} of {RETENTION[k]}" for k, g in AXES[:2]]
    return (
        "The frontier: what is gained where at most so much is lost of what stands behind the comma, as a mean over "
        "losses from 0 to that (first four columns), or at one loss. Nothing where the method never keeps so much.\n\n"
        + table(head, rows)
    )


def difference_table(results: Results, setting: Setting, ours: str) -> str:
    """One of ours less every other method, on the same documents: between frontiers, and mirrored."""
    mine = results.scored(setting, ours)
    gains = {gained: HALF * gain_of(results, setting, gained) for gained in GAIN}
    rows = []
    for method in (m for m in results.methods(setting) if m != ours):
        theirs = results.scored(setting, method)
        cells = [
            decided(results, [a.area(*axes) - b.area(*axes) for a, b in zip(mine, theirs, strict=True)])
            for axes in AXES
        ]
        mirrored = [
            decided(
                results,
                [a.kept_at(k, g, gains[g]) - b.kept_at(k, g, gains[g]) for a, b in zip(mine, theirs, strict=True)],
            )
            for k, g in AXES[:2]
        ]
        rows.append((METHODS[method].title, *cells, *mirrored))
    head = ["less", *(f"{GAIN[g]} / {RETENTION[k]}" for k, g in AXES)]
    head += [f"{RETENTION[k]} kept at half of dense's gain" for k, g in AXES[:2]]
    return (
        f"**{METHODS[ours].title}** less every other method, between their frontiers; in the last two columns the "
        "mirror image.\n\n" + table(head, rows)
    )


def gain_of(results: Results, setting: Setting, gained: str) -> float:
    """What the dense way gains when it keeps all of its change: what mirrored comparisons are measured by."""
    runs = results.scored(setting, "dense") if "dense" in results.methods(setting) else []
    return float(np.mean([run.test[gained][0, -1] for run in runs])) if runs else 0.0


def mean_of(results: Results, figures: Sequence[np.ndarray], part: str = "test") -> Interval | None:
    """Interval of the mean over seeds; None where a seed has no such figure."""
    stacked = np.stack(figures, axis=1)
    if not np.isfinite(stacked[0]).all():
        return None
    # A replicate that never keeps so much says nothing; it is left out, as long as few do.
    whole = stacked[np.isfinite(stacked).all(axis=1)]
    documents = min(len(sizes) for sizes in results.sizes[part].values())
    return interval(whole, documents) if len(whole) > 0.9 * len(stacked) else None


def decided(results: Results, figures: Sequence[np.ndarray]) -> str:
    """A difference, and whether its interval leaves out 0."""
    found = mean_of(results, figures)
    if found is None:
        return ""
    verdict = "won" if found.low > 0 else "lost" if found.high < 0 else "undecided"
    return f"{shown(found)} {verdict}"


def shown(found: Interval | None) -> str:
    """Three digits, with no sign on a zero."""
    if found is None:
        return ""
    value, low, high = (f"{round(float(v), 3) + 0.0:+.3f}".replace("+0.000", "0.000") for v in found)
    return f"{value} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, made: str) -> str:
    """A page's text with what was made between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"
